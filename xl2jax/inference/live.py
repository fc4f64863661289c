"""A live video: it is watched as it comes, in memory that does not grow, and questions are asked at any time.

live = model.watch_live(frames, fps=1)      # an iterable of (seconds, frame), or an address
live.start()                                # watches in a thread
model.ask(live, "What is happening?")       # about what was seen so far
live.close()
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError, first_line
from xl2jax.inference import session
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.live_arena import LiveArena
from xl2jax.inference.live_blocks import BlockStore
from xl2jax.inference.live_sizes import LiveMemory, LiveSizes
from xl2jax.inference.network import Network
from xl2jax.inference.pictures import Surroundings
from xl2jax.inference.selection import RelevanceConfig
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.prompt import PromptTokenizer
from xl2jax.video.live_clock import ClockMode, LiveClock
from xl2jax.video.live_source import Buffer, Stream
from xl2jax.video.read_ahead import resize

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0
"""Frames that are further apart than this, and than eight frames, are never in one group."""

WAITING_FRAMES = 64
"""Frames of a source that may wait until they are seen."""

type Frame = np.ndarray | Callable[[], np.ndarray | None]
"""A frame, uint8 RGB [height, width, 3], or a function that makes it, or None where it is damaged. The function is called
only for frames that are kept."""


class LiveVideo:
    """A video that is being watched. `Model.watch_live` makes it; `Model.ask` asks about what was seen so far.

    Frames are fed by hand (`add`), or from the source by `run` in the caller's thread or by `start` in one of its own. Any
    thread may ask meanwhile. Frames are seen in groups of 4, so that up to 3 frames wait for others.

    Where one thread does all work on the device, others `offer` frames, or `read` the source, and that thread calls `step`.

    Attributes:
      path: the source, for messages.
      clock: the video's time, and what was left out because of it.
      seconds: time of the last frame that a question sees; 0 before there is one.
      frames: those of all whole groups, the forgotten ones included. A question sees them.
      gaps: pauses after which a new group of frames began.
      error: what ended the watching, if anything did.
      started_at: `time.time()` when the first frame came.
      sizes: the sizes of its arrays, and the minutes that hold.
      on_offer: called where a frame begins to wait for `step`, and where the source has ended.
    """

    lead: str
    seconds = 0.0
    frames = 0
    gaps = 0
    error: BaseException | None = None

    def __init__(
        self,
        network: Network,
        tokenizer: PromptTokenizer,
        around: Surroundings,
        source: Iterable[tuple[float | None, Frame]] | None,
        sizes: LiveSizes,
        *,
        path: str,
        fps: float | None,
        clock: ClockMode,
        bilevel: BilevelConfig,
        cache: CacheConfig,
        memory: LiveMemory,
    ):
        """Raises NotEnoughMemory where the arrays and one question do not fit into the memory of the device."""
        self._network, self._tokenizer, self._bilevel = network, tokenizer, bilevel
        self.path, self.lead, self.clock = path, around.lead, LiveClock(fps, clock)
        self._pause = max(PAUSE_SECONDS, 8 / fps if fps else 0.0)
        self.sizes, self._plan = sizes, sizes.plan
        piece_groups = sizes.piece_groups(network, memory)
        self._lock, self._seen = threading.RLock(), threading.Condition()
        self._blocks = BlockStore(int(memory.host_gib * 2**30), int(memory.disk_gib * 2**30), memory.folder)
        self._arena = LiveArena(
            network,
            around.before,
            self._plan,
            dataclasses.replace(sizes.ledger),
            self._blocks,
            pool=bilevel.pool,
            quantized=cache.quantized,
            quantized_pooled=memory.pooled_dtype == "int8",
            renumber=memory.renumber,
            piece_groups=piece_groups,
        )
        self._device_bytes = self._arena.nbytes
        logger.info(
            "a live video keeps %.4g minutes dense and remembers %.4g, in %.2f GiB of device memory",
            sizes.dense_minutes, sizes.minutes, self._device_bytes / 2**30,
        )  # fmt: skip
        self._source = source
        self._drops = isinstance(source, Stream) and source.is_url
        self._buffer = Buffer[tuple[float, np.ndarray]](WAITING_FRAMES)
        self._room, self._feeding = threading.Semaphore(WAITING_FRAMES), threading.Lock()
        self._told = 0
        self.on_offer: Callable[[], None] = lambda: None
        self._last: float | None = None  # time of the last frame that was kept
        self._open: list[tuple[float, np.ndarray]] = []  # frames of the next group
        self._waiting: list[list[tuple[float, np.ndarray]]] = []  # groups that are not prefilled yet
        self._times: list[float] = []  # of the frames of all remembered groups
        self._forgotten = 0
        self._previous: Any = None  # an array; its type lacks is_ready()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.finished = self.closed = False
        self._failure: str | None = None
        self.started_at: float | None = None

    # --- watching --------------------------------------------------------------------------------

    def add(self, seconds: float | None, frame: Frame) -> bool:
        """Adds a frame, uint8 RGB [height, width, 3] of any size, and says whether it is kept.

        `seconds` is the time by the source's clock; without it the frame follows the last one by as much as it comes after
        it. Frames that are out of order or above the frame rate are left out (`LiveClock`).

        Raises UserError where the frame is no picture, or the video was closed.
        """
        kept = self.accept(seconds, frame)
        if kept is not None:
            self.add_kept(*kept)
        return kept is not None

    def accept(self, seconds: float | None, frame: Frame) -> tuple[float, np.ndarray] | None:
        """A frame as `add_kept` takes it, or None where it is left out. One thread calls it at a time."""
        at = self.clock.accept(seconds)
        if at is None:
            return None
        image = frame() if callable(frame) else frame
        if image is None:
            self.clock.lost()
            return None
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
            raise UserError(f"{self.path}: a frame is not a uint8 array [height, width, 3]")
        if 0 in image.shape:
            raise UserError(f"{self.path}: a frame has no pixels")
        return at, resize(image, self._network.config.vision.image_size)

    def add_kept(self, seconds: float, image: np.ndarray) -> None:
        """Adds a frame that `accept` returned. Groups are prefilled at once where the device has nothing else to do;
        otherwise they wait until it has, or a whole step of them is there."""
        with self._lock:
            self._append(seconds, image)
            self._prefill_if_idle()
        self._blocks.settle()

    def _append(self, seconds: float, image: np.ndarray) -> None:
        """Puts a frame to those of the next group. A whole step of groups is prefilled."""
        self._require_open()
        if self.started_at is None:
            self.started_at = time.time()
        if self._last is not None and seconds - self._last > self._pause:
            self.gaps += 1
            if self._open:
                self._fill()
        self._last = seconds
        self._open.append((seconds, image))
        if len(self._open) == FRAMES_PER_GROUP:
            self._close_group()

    def flush(self) -> None:
        """Prefills the whole groups that wait."""
        with self._lock:
            self._require_open()
            if self._waiting:
                self._prefill()
        self._blocks.settle()

    def end(self) -> None:
        """Ends the video. Frames that do not fill a group are left out, as at the end of a file."""
        with self._lock:
            if not self.closed:
                if self._open and not self._times and not self._waiting:
                    self._fill()
                self._open = []
                self.flush()
        with self._seen:
            self.finished = True
            self._seen.notify_all()

    def _fill(self) -> None:
        """Makes a group of the frames before a pause: the last one is repeated."""
        missing = FRAMES_PER_GROUP - len(self._open)
        self._open += [self._open[-1]] * missing
        self._close_group()

    def _close_group(self) -> None:
        self._waiting.append(self._open)
        self._open = []
        with self._seen:
            self.seconds = round(self._waiting[-1][-1][0], 1)
            self.frames += FRAMES_PER_GROUP
            self._seen.notify_all()
        if len(self._waiting) == self._plan.segment_groups:
            self._prefill()

    def _prefill_if_idle(self) -> None:
        """Prefills what waits if the step before is done."""
        if self._waiting and (self._previous is None or self._previous.is_ready()):
            self._prefill()

    def _prefill(self) -> None:
        """Prefills what waits. Where that fails in the middle, the video cannot be used any more."""
        try:
            self._prefill_step()
        except BaseException as e:
            self._failure = first_line(e) if isinstance(e, Exception) else type(e).__name__
            raise

    def _prefill_step(self) -> None:
        groups, self._waiting = self._waiting, []
        times = [round(seconds, 1) for group in groups for seconds, _ in group]
        frames = np.stack([image for group in groups for _, image in group])
        visual = session.encode(self._network, self._plan, frames)
        forgotten = self._arena.add(visual, self._tokenizer.time_ids(times))
        self._times += times
        if forgotten:
            del self._times[: forgotten * FRAMES_PER_GROUP]
            self._forgotten += forgotten
        if self._previous is not None:
            jax.block_until_ready(self._previous)  # a third segment would only hold memory
        self._previous = self._arena.finite

    # --- from a source ---------------------------------------------------------------------------

    def run(self) -> None:
        """Watches the source to its end, or until `close`. Errors are those of `read` and of `add`.

        The source is read by a thread of its own, which `close` leaves behind where it waits for a frame. Up to
        `WAITING_FRAMES` frames wait until they are seen. Where those of a URL come faster, the oldest that wait are
        dropped; all other sources are held up.
        """
        threading.Thread(target=self._read_quietly, daemon=True, name=f"read {self.path}").start()
        try:
            while not self._stop.is_set():
                frames = self._buffer.take(0.2)
                if frames is None:
                    break
                for kept in frames:
                    self.add_kept(*kept)
                    if not self._drops:
                        self._room.release()
                with self._lock:
                    if not self.closed:
                        self._prefill_if_idle()  # what waits does not need another frame
                self._tell_dropped()
        finally:
            self._stop.set()
            if isinstance(self._source, Stream):
                self._source.close()
            self._room.release()  # a reader that waits for room ends
        if self.error is not None:
            raise self.error
        self.end()

    def _require_source(self) -> Iterable[tuple[float | None, Frame]]:
        if self._source is None:
            raise UserError(f"{self.path}: has no source: feed it with add()")
        return self._source

    def read(self) -> None:
        """Reads the source to its end, or until `close`. Its frames wait to be seen by `run` or `step`.

        Raises what the source and `accept` raise, which `error` is from then on.
        """
        source = self._require_source()
        if isinstance(source, Stream):
            source.on_reopen = self.clock.interrupted
        try:
            for seconds, frame in source:
                if (kept := self.accept(seconds, frame)) is not None:
                    if not self._drops:
                        self._room.acquire()
                    self._buffer.put(kept)
                    self.on_offer()
                if self._stop.is_set():
                    break
        except BaseException as e:
            if not self.closed:
                self.error = e
            raise
        finally:
            self._buffer.end()
            self.on_offer()

    def _read_quietly(self) -> None:
        with contextlib.suppress(BaseException):  # `run` raises it
            self.read()

    def offer(self, seconds: float | None, frame: Frame) -> bool:
        """`add` from any thread: the frame waits to be seen by `step`. Where `WAITING_FRAMES` wait, the oldest is dropped."""
        with self._feeding:
            self._require_open()
            kept = self.accept(seconds, frame)
            if kept is not None:
                self._buffer.put(kept)
        if kept is not None:
            self.on_offer()
        return kept is not None

    def interrupted(self) -> None:
        """Says that frames come from elsewhere from now on: the time until the next one is counted by this machine's clock."""
        with self._feeding:
            self.clock.interrupted()

    def step(self) -> bool:
        """Sees up to a step of the frames that wait, and waits for the device. Returns whether there were any.

        Behind the last frame of the source it ends the video.
        """
        frames = self._buffer.take(0, self._plan.segment_groups * FRAMES_PER_GROUP)
        if frames is None:
            if not self.finished:
                self.end()
            return False
        with self._lock:
            for kept in frames:
                self._append(*kept)
            if self._waiting:
                self._prefill()
            jax.block_until_ready(self._previous)
        if frames and not self._drops:
            self._room.release(len(frames))
        self._blocks.settle()
        self._tell_dropped()
        return bool(frames)

    @property
    def dropped(self) -> int:
        """Frames that were left out because they came faster than they could be seen."""
        return self._buffer.dropped

    def _tell_dropped(self) -> None:
        if self.dropped >= 2 * self._told + 1:
            self._told = self.dropped
            logger.warning("%s: frames come faster than they can be seen: %d dropped so far", self.path, self._told)

    def start(self, *, log_error: bool = True) -> None:
        """Watches the source in a thread. `wait` waits for its end and raises its error, which is also logged unless
        `log_error` is false."""
        self._require_source()
        if self._thread is not None:
            raise UserError(f"{self.path}: is being watched already")
        self._thread = threading.Thread(target=self._work, args=(log_error,), daemon=True, name=f"watch {self.path}")
        self._thread.start()

    def _work(self, log_error: bool) -> None:
        try:
            self.run()
        except BaseException as e:
            if not self.closed:
                self.error = e
                kind = logging.WARNING if isinstance(e, UserError) else logging.ERROR
                logger.log(
                    kind if log_error else logging.DEBUG,
                    "watching ended: %s",
                    first_line(e) if isinstance(e, Exception) else type(e).__name__,
                )
            with contextlib.suppress(Exception):
                self.end()
        finally:
            with self._seen:
                self.finished = True
                self._seen.notify_all()

    def wait(self, seconds: float | None = None, timeout: float | None = None) -> bool:
        """Waits until a question sees the video up to `seconds`, or to its end. Returns whether it was, before `timeout` s.

        Raises what ended the watching in a thread of its own.
        """
        with self._seen:
            done = self._seen.wait_for(
                lambda: self.finished or (seconds is not None and self.seconds >= seconds), timeout
            )
        if self.error is not None:
            raise self.error
        return done

    # --- questions -------------------------------------------------------------------------------

    def check_reading(self, bilevel: BilevelConfig | None, relevance: RelevanceConfig) -> None:
        """Raises UserError for settings with which a live video cannot be read."""
        kept = self._bilevel
        if bilevel is None:
            raise UserError("a live video is read with bi-level decoding only: its whole dense KV changes all the time")
        if (bilevel.pool, bilevel.select_chunk_groups) != (kept.pool, kept.select_chunk_groups):
            raise UserError(
                f"this live video is kept for pool {kept.pool} and chunks of {kept.select_chunk_groups} groups, not for "
                f"pool {bilevel.pool} and chunks of {bilevel.select_chunk_groups} groups"
            )
        if relevance.scorer == "file":
            raise UserError("a selection file has no entries for a live video: choose another scorer")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Raises UserError where the video was closed. An answer that has begun goes on after that."""
        self._require_open()
        yield

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[WatchedVideo]:
        """The video as it was seen so far, which does not change within the block."""
        with self._lock:
            self._require_open()
            if self._waiting:
                self._prefill()
            if not self._times:
                raise UserError(f"{self.path}: nothing was seen yet (a question needs {FRAMES_PER_GROUP} frames)")
            yield WatchedVideo(
                path=self.path,
                duration=self._times[-1],
                times=list(self._times),
                kv=self._arena.kv(),
                timings={},
                thumbnails=[],
                head_copies=self._network.head_copies,
                lead=self.lead,
                first_chunk=self._forgotten // self._bilevel.select_chunk_groups,
            )

    @property
    def device_bytes(self) -> int:
        """Bytes that the video holds on the device."""
        return 0 if self.closed else self._device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of dense KV in host memory."""
        return self._blocks.host_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of dense KV on the disk."""
        return self._blocks.disk_bytes

    def _require_open(self) -> None:
        if self.closed:
            raise UserError(f"{self.path}: the live video was closed")
        if self._failure is not None:
            raise UserError(f"{self.path}: watching failed ({self._failure}): start to watch anew")

    def close(self) -> None:
        """Stops watching and frees all memory and files."""
        self._stop.set()
        if isinstance(self._source, Stream):
            self._source.close()
        self._room.release()  # a reader that waits for room ends
        with self._lock:
            if not self.closed:
                self.closed = True
                del self._arena
                self._waiting, self._open = [], []
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._blocks.close()
        with self._seen:
            self.finished = True
            self._seen.notify_all()

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
