"""A video that is being watched, a segment at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.inference import session
from xl2jax.inference.layout import VideoLayout
from xl2jax.inference.network import Network
from xl2jax.inference.offload import to_host
from xl2jax.inference.prefill import PrefillPlan
from xl2jax.inference.progress import Stages, timed
from xl2jax.inference.video_cache import THUMBNAIL_SIZE, CacheConfig, WatchedVideo, thumbnail_places
from xl2jax.video.clip import Clip
from xl2jax.video.read_ahead import default_workers, resize


class Watching:
    """Puts a clip into a KV cache: `add` each of `batches`, then `finish`. `Model.start_watch` makes it.

    Attributes:
      frames: how many frames have been added.
      total: how many frames were chosen. A damaged file ends with fewer.
    """

    def __init__(
        self,
        network: Network,
        clip: Clip,
        layout: VideoLayout,
        plan: PrefillPlan,
        prefix: list[int],
        time_ids: list[list[int]],
        cache: CacheConfig,
        *,
        started: float,
        measure_stages: bool = False,
    ):
        """`started`: reading of `time.perf_counter()` when the clip began to be opened."""
        self._network, self._clip, self._plan, self._cache = network, clip, plan, cache
        self._started, self._timings = started, {"read": time.perf_counter() - started}
        self._stages = Stages(measure_stages)
        self._wanted = thumbnail_places(clip)
        self._thumbnails: list[tuple[float, np.ndarray]] = []
        self._previous: jax.Array | None = None
        self.frames, self.total = 0, len(clip.indices)
        self._prefill = session.VideoPrefill(network, layout, plan, prefix, time_ids, quantized=cache.quantized)

    def batches(self) -> Iterator[np.ndarray]:
        """The frames of each segment, uint8 [F, H, W, 3], read ahead by threads. See `Clip.batches`.

        Another thread may read them while this one adds those before.
        """
        segment_frames = self._plan.segment_groups * FRAMES_PER_GROUP
        batches = self._clip.batches(segment_frames, self._network.config.vision.image_size, workers=default_workers())
        return timed(batches, self._timings, "read")

    def add(self, frames: np.ndarray, *, wait: bool = False) -> None:
        """Encodes and prefills the next of `batches`.

        Without `wait` one segment is still being computed when this returns, so that the next one can be read and
        copied meanwhile. With it nothing is.
        """
        shown = [i for i in self._wanted if self.frames <= i < self.frames + len(frames)]
        self._thumbnails += [(self._clip.times[i], resize(frames[i - self.frames], THUMBNAIL_SIZE)) for i in shown]
        self.frames += len(frames)
        self._stages.begin()
        visual = session.encode(self._network, self._plan, frames)
        self._stages.end("vision", visual)
        self._prefill.add(visual, len(frames) // FRAMES_PER_GROUP)
        self._stages.end("prefill", self._prefill.cache)
        if wait:
            jax.block_until_ready(self._prefill.cache)
        elif self._previous is not None:
            jax.block_until_ready(self._previous)  # a third segment would only hold memory
        self._previous = visual

    def finish(self) -> WatchedVideo:
        """The watched video. Raises UserError where its KV is not finite."""
        kv = self._prefill.finish()
        compute = time.perf_counter() - self._started - self._timings["read"]
        self._timings |= self._stages.seconds if self._stages.measured else {"compute": compute}
        if self._cache.offload:
            kv.cache, kv.host = to_host(kv.cache, self._plan.visual_start)
        return WatchedVideo(
            path=str(self._clip.path),
            duration=self._clip.duration,
            times=self._clip.times[: self.frames],
            kv=kv,
            timings=self._timings,
            thumbnails=self._thumbnails,
            head_copies=self._network.head_copies,
        )
