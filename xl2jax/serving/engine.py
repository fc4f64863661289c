"""The one thread that owns the model: it answers questions, and watches videos a part at a time between them.

In each round all answers are decoded by up to eight tokens, one part of a stored video is read, and one part of a new
video is watched: a segment is encoded, or prefilled. A step of one of the live videos follows. Before each of these steps
the questions that have come begin, if their video is on the device, and get their first token. A question about a watched
video therefore waits for at most one of them: half a segment of another client's video, say.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator

import numpy as np

from xl2jax.errors import NotEnoughMemory, UserError
from xl2jax.inference.answering import Answering, decode
from xl2jax.inference.api import Model
from xl2jax.inference.pictures import Surroundings
from xl2jax.serving.errors import RequestError, internal_error, not_kept, request_error, shutting_down
from xl2jax.serving.jobs import Begun, Ended, Failed, Job, Piece, Watched
from xl2jax.serving.limits import Limits
from xl2jax.serving.live import LiveSessions, unknown_live
from xl2jax.serving.metrics import Metrics
from xl2jax.serving.new_video import NewVideo
from xl2jax.serving.reply import VideoUse
from xl2jax.serving.stops import StopTexts
from xl2jax.serving.videos import VideoKey, WatchedVideos
from xl2jax.video.clip import Clip

logger = logging.getLogger(__name__)

_TEND_SECONDS = 1.0
"""How often live videos are looked at that nobody feeds."""


class _Answer:
    """A job whose answer is decoded."""

    def __init__(self, job: Job, answering: Answering):
        self.job, self.answering = job, answering
        self.stops = StopTexts(job.asked.stop)


class Engine:
    """Runs jobs until it is stopped.

    finish_abandoned: a video is watched to its end when its clients have gone. warm_up: what is done before the first
    job, in steps; it may raise UserError.
    """

    def __init__(
        self,
        model: Model,
        videos: WatchedVideos,
        limits: Limits,
        metrics: Metrics,
        live: LiveSessions,
        *,
        finish_abandoned: bool = False,
        warm_up: Callable[[], Iterator[None]] | None = None,
    ):
        self._warm_up, self._warm = warm_up, warm_up is None
        self.model, self._videos, self._limits, self._metrics = model, videos, limits, metrics
        self._live, live.wake = live, self._wake
        self._finish_abandoned = finish_abandoned
        self._inbox: collections.deque[Job] = collections.deque()
        self._ready: collections.deque[Job] = collections.deque()
        self._answers: list[_Answer] = []
        self._loads: dict[str, tuple[list[Job], Generator[bool, None, None] | None]] = {}
        self._watches: collections.deque[NewVideo] = collections.deque()
        self._changed = threading.Condition()
        self._woken = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from other threads ---------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether it is alive and has warmed up."""
        return self.alive and self._warm

    def submit(self, job: Job) -> None:
        self._inbox.append(job)
        self._wake()

    def cancel(self, job: Job) -> None:
        """Ends a job: its answer stops before its next step, and nothing more is emitted."""
        if not job.cancelled:
            job.cancelled = True
            self._wake()

    def stop(self) -> None:
        """Fails what is left, waits for the thread, and for the files that are being written."""
        self._stopped = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._videos.close()

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    # --- in the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        if self._warm_up is not None:
            started = time.monotonic()
            try:
                for _ in self._warm_up():
                    if self._stopped:
                        break
                else:
                    logger.info("warmed up in %.1f s: common programs are compiled", time.monotonic() - started)
            except Exception as e:  # the first questions compile them then
                logger.warning("could not warm up: %s", e, exc_info=not isinstance(e, UserError))
            self._warm = True
        while not self._stopped:
            with self._changed:
                if not (self._woken or self._answers or self._ready or self._loads):
                    self._changed.wait(_TEND_SECONDS if self._live.any else None)
                self._woken = False
            try:
                self._round()
            except Exception:  # none is expected here: each step handles its own
                logger.exception("the engine failed in a round")
                self._fail_all(internal_error())
        self._fail_all(shutting_down())
        self._live.close()

    def _round(self) -> None:
        for step in (self._decode, self._load, self._watch, self._see):
            self._begin_new()
            step()
        self._publish()

    def _begin_new(self) -> None:
        """Begins the questions that have come. Those that come meanwhile wait for one step of other work."""
        self._live.tend()
        while self._inbox:
            self._accept(self._inbox.popleft())
        self._drop_cancelled()
        while self._ready and len(self._answers) < self._limits.answers:
            self._begin(self._ready.popleft())

    def _publish(self) -> None:
        waiting = len(self._ready) + sum(len(jobs) for jobs, _ in self._loads.values())
        self._metrics.waiting.set(waiting + sum(len(watch.jobs) for watch in self._watches))
        self._metrics.answering.set(len(self._answers))
        self._videos.publish()

    def _accept(self, job: Job) -> None:
        """Puts a new job where it waits for its video."""
        if job.live is not None:
            self._ready.append(job)
            return
        job.key = self._videos.first_key(job.key)
        place = self._videos.place(job.key)
        self._metrics.lookups.labels(place or "none").inc()
        for watch in self._watches:
            if watch.key.name == job.key.name:
                job.cached = False
                watch.jobs.append(job)
                return
        if place == "device":
            self._videos.hold(job.key)
            self._ready.append(job)
        elif place is not None:
            self._loads.setdefault(job.key.name, ([], None))[0].append(job)
        else:
            self._watch_for(job)

    def _watch_for(self, job: Job) -> None:
        job.cached = False
        if job.media is None:
            job.emit(Failed(not_kept()))
            return
        self._watches.append(NewVideo(job, self._limits, self._wake, self.model.around))

    def _drop_cancelled(self) -> None:
        for answer in [a for a in self._answers if a.job.cancelled]:
            self._metrics.cancelled.inc()
            self._end(answer)
        for job in [j for j in self._ready if j.cancelled]:
            self._metrics.cancelled.inc()
            self._ready.remove(job)
            self._release(job)
        for name, (jobs, loading) in list(self._loads.items()):
            jobs[:] = [j for j in jobs if not j.cancelled]
            if not jobs:
                if loading is not None:
                    loading.close()
                del self._loads[name]
        for watch in list(self._watches):
            gone = [j for j in watch.jobs if j.cancelled]
            self._metrics.cancelled.inc(len(gone))
            watch.jobs = [j for j in watch.jobs if not j.cancelled]
            if not watch.jobs and not (self._finish_abandoned and watch.watching is not None):
                self._close_watch(watch)

    # --- answers --------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        """Begins the answer of a job whose video is held, up to its first token."""
        asked = job.asked
        try:
            if job.live is not None and job.live.over is not None:
                raise unknown_live()
            video = self._videos.get(job.key) if job.live is None else job.live.video
            with video.snapshot() as seen:
                answering = self.model.start_answer(
                    video,
                    asked.question,
                    max_new_tokens=asked.max_new_tokens,
                    sampling=asked.sampling,
                    seed=asked.seed,
                    bilevel=asked.bilevel,
                    history=asked.history,
                )
        except Exception as e:
            self._release(job)
            job.emit(Failed(self._error(e, job)))
            return
        layout = seen.kv.layout
        prompt = layout.tokens + answering.suffix_tokens
        tokens = layout.tokens - layout.prefix + seen.picture_tokens
        seconds = None if job.live is None else seen.times[-1]
        use = VideoUse(len(seen.times), tokens, prompt, job.cached, answering.chunks, seconds)
        self._metrics.prompt_tokens.inc(prompt)
        job.emit(Begun(use))
        answer = _Answer(job, answering)
        self._answers.append(answer)
        self._read(answer)

    def _decode(self) -> None:
        """One step of all answers, if there are any."""
        if not self._answers:
            return
        started = time.monotonic()
        try:
            decode([answer.answering for answer in self._answers])
        except Exception as e:
            for answer in list(self._answers):
                self._end(answer)
                answer.job.emit(Failed(self._error(e, answer.job)))
            return
        self._metrics.decode_seconds.inc(time.monotonic() - started)
        for answer in list(self._answers):
            self._read(answer)

    def _read(self, answer: _Answer) -> None:
        """Passes on what was decoded of an answer."""
        job, before = answer.job, answer.answering.new_tokens
        try:
            text = answer.answering.read()
        except UserError as e:
            self._end(answer)
            job.emit(Failed(self._error(e, job)))
            return
        if before == 0:
            self._metrics.first_token.labels("before" if job.cached else "for it").observe(
                time.monotonic() - job.arrived
            )
        self._metrics.new_tokens.inc(answer.answering.new_tokens - before)
        if text := answer.stops.add(text, final=answer.answering.finished):
            job.emit(Piece(text))
        if answer.stops.found or answer.answering.finished:
            result = answer.answering.answer
            self._end(answer)
            job.emit(Ended("stop" if answer.stops.found else result.finish_reason, result.new_tokens))

    def _end(self, answer: _Answer) -> None:
        answer.answering.close()
        self._answers.remove(answer)
        self._release(answer.job)

    def _release(self, job: Job) -> None:
        if job.live is None:
            self._videos.release(job.key)
        else:
            job.live.touch()

    # --- videos ---------------------------------------------------------------------------------

    def _make_ready(self, key: VideoKey, jobs: list[Job]) -> None:
        for job in jobs:
            self._videos.hold(key)
            self._ready.append(job)

    def _load(self) -> None:
        """One step of the first video that is on its way to the device, if there is one."""
        if not self._loads:
            return
        name, (jobs, loading) = next(iter(self._loads.items()))
        key = jobs[0].key
        place = self._videos.place(key)
        if loading is None and place is None:  # it was dropped meanwhile
            del self._loads[name]
            for job in jobs:
                self._accept(job)
            return
        try:
            if loading is None and place == "host":
                if not self._videos.restore(key):
                    self._pause()
                    return
            else:
                loading = loading or self._videos.load(key)
                self._loads[name] = (jobs, loading)
                if not next(loading):
                    self._pause()
                return
        except StopIteration:
            pass
        except NotEnoughMemory as e:
            if self._videos.free_some():
                self._loads[name] = (jobs, None)
                return
            del self._loads[name]
            for job in jobs:
                job.emit(Failed(self._error(e, job)))
            return
        except UserError:  # the file is damaged or gone
            del self._loads[name]
            for job in jobs:
                self._accept(job)
            return
        except Exception as e:
            del self._loads[name]
            for job in jobs:
                job.emit(Failed(self._error(e, job)))
            return
        del self._loads[name]
        self._make_ready(key, jobs)

    def _watch(self) -> None:
        """One part of the first new video, or what has to be done before the first one and behind the last one."""
        if not self._watches:
            return
        watch = self._watches[0]
        watch.open()
        try:
            if watch.parts is not None:
                self._add_part(watch, watch.parts)
            elif watch.watching is None and watch.opened is not None:
                self._start(watch, watch.opened)
                return
            else:
                self._take(watch)
        except Exception as e:
            self._close_watch(watch)
            for job in watch.jobs:
                job.emit(Failed(self._error(e, job, watch)))
        if watch.parts is not None or watch.has_read:
            self._wake()

    def _take(self, watch: NewVideo) -> None:
        """Works on the next thing that was read of a video."""
        match watch.take():
            case None:
                pass
            case Exception() as e:
                raise e
            case Clip() | Surroundings() as opened:
                if isinstance(opened, Clip) and self._accept_as_known(watch, opened):
                    return
                watch.opened = opened
                self._start(watch, opened)
            case np.ndarray() as images:
                assert watch.watching is not None
                watch.parts = watch.watching.parts(images)
                self._add_part(watch, watch.parts)
            case _:
                assert watch.watching is not None
                video = watch.watching.finish()
                self._close_watch(watch)
                self._videos.add(watch.key, video)
                self._make_ready(watch.key, watch.jobs)

    def _see(self) -> None:
        """One step of a live video, if frames of one wait."""
        if self._live.step():
            self._wake()

    def _accept_as_known(self, watch: NewVideo, clip: Clip) -> bool:
        """Whether other settings chose the same frames before: the jobs then wait for the video that has them."""
        if self._videos.same_frames(watch.key, clip).name == watch.key.name:
            return False
        self._close_watch(watch)
        for job in watch.jobs:
            job.cached = True
            self._accept(job)
        return True

    def _add_part(self, watch: NewVideo, parts: Iterator[None]) -> None:
        """Computes a part of a segment of frames, or of tiles."""
        assert watch.watching is not None
        before, started = watch.watching.done, time.monotonic()
        ended = next(parts, "ended") == "ended"
        self._metrics.watch_seconds.inc(time.monotonic() - started)
        if ended:
            watch.parts = None
            self._metrics.frames.inc(watch.watching.done - before)
            for job in watch.jobs:
                job.emit(Watched(watch.watching.done, watch.watching.total))

    def _start(self, watch: NewVideo, opened: Clip | Surroundings) -> None:
        """Begins to watch a clip or pictures as soon as there is room for them."""
        clip, around = (None, opened) if isinstance(opened, Surroundings) else (opened, None)
        need = self._videos.needed(clip, around)
        if not self._videos.make_room(need):
            self._pause()
            return
        while True:
            try:
                watching = self.model.start_watch(clip, self._videos.prefill, around=around, cache=self._videos.cache)
                break
            except NotEnoughMemory:
                if not self._videos.free_some():
                    raise
        watch.reserved = need
        self._videos.reserve(need)
        watch.begin(watching)

    def _close_watch(self, watch: NewVideo) -> None:
        self._watches.remove(watch)
        watch.close()
        self._videos.reserve(-watch.reserved)
        watch.watching = watch.parts = None
        self._wake()  # the next one can begin

    def _pause(self) -> None:
        """There is no room before an answer has ended: nothing is to be done until then."""
        if not self._answers and not self._ready:
            time.sleep(0.02)
        self._wake()

    # --- failures -------------------------------------------------------------------------------

    def _error(self, error: Exception, job: Job, watch: NewVideo | None = None) -> RequestError:
        paths = [media.path for media in (job.media, watch) if media is not None]
        return request_error(error, paths, too_large="video_too_large")

    def _fail_all(self, error: RequestError) -> None:
        jobs = [*self._inbox, *self._ready, *(a.job for a in self._answers)]
        jobs += [job for waiting, _ in self._loads.values() for job in waiting]
        for answer in self._answers:
            answer.answering.close()
        for job in [*self._ready, *(a.job for a in self._answers)]:
            self._release(job)
        for watch in list(self._watches):
            jobs += watch.jobs
            self._close_watch(watch)
        for queue_ in (self._inbox, self._ready, self._answers, self._loads):
            queue_.clear()
        for job in jobs:
            job.emit(Failed(error))
