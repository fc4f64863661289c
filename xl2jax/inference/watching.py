"""A video or pictures that are being watched, a part at a time."""

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
from xl2jax.inference.pictures import Surroundings
from xl2jax.inference.prefill import PrefillPlan
from xl2jax.inference.progress import Stages, timed
from xl2jax.inference.video_cache import THUMBNAIL_SIZE, CacheConfig, WatchedVideo, thumbnail_places
from xl2jax.video.clip import Clip
from xl2jax.video.read_ahead import default_workers, resize


class Watching:
    """Puts pictures and a clip into a KV cache: `add` each of `batches`, then `finish`. `Model.start_watch` makes it.

    The tiles of all pictures are encoded first. Then come the text and the pictures before the clip, its segments, and in
    `finish` what stands behind it.

    Attributes:
      done: how many tiles and frames have been added.
      total: how many there are. A damaged file ends with fewer.
    """

    def __init__(
        self,
        network: Network,
        clip: Clip | None,
        around: Surroundings,
        layout: VideoLayout,
        plan: PrefillPlan,
        time_ids: list[list[int]],
        cache: CacheConfig,
        *,
        started: float,
        measure_stages: bool = False,
    ):
        """`started`: reading of `time.perf_counter()` when the clip began to be opened."""
        self._network, self._clip, self._plan, self._cache = network, clip, plan, cache
        self._around, self._layout, self._time_ids = around, layout, time_ids
        self._started, self._timings = started, {"read": time.perf_counter() - started}
        self._stages = Stages(measure_stages)
        self._stages.begin()
        self._wanted = [] if clip is None else thumbnail_places(clip)
        self._thumbnails: list[tuple[float, np.ndarray]] = []
        self._previous: jax.Array | None = None
        self.done, self._frames, tiles = 0, 0, len(around.tiles)
        self.total = tiles + (0 if clip is None else len(clip.indices))
        self._tiles = session.TileTokens(network, tiles) if tiles else None
        self._prefill: session.VideoPrefill | None = None
        if self._tiles is None:
            self._begin(None)

    def _begin(self, pictures: jax.Array | None) -> None:
        """Prefills what stands before the clip. `pictures`: the visual tokens of all tiles."""
        self._prefill = session.VideoPrefill(
            self._network,
            self._layout,
            self._plan,
            self._around.before,
            self._time_ids,
            pictures=pictures,
            quantized=self._cache.quantized,
        )
        self._stages.end("prefill", self._prefill.cache)

    def batches(self) -> Iterator[np.ndarray]:
        """Tiles, then the frames of each segment: uint8 [n, H, W, 3]. Frames are read ahead by threads (`Clip.batches`).

        Another thread may read them while this one adds those before.
        """
        tiles, most = self._around.tiles, session.tiles_at_once(self._network.platform)
        yield from (tiles[first : first + most] for first in range(0, len(tiles), most))
        if self._clip is not None:
            size, frames = self._network.config.vision.image_size, self._plan.segment_groups * FRAMES_PER_GROUP
            yield from timed(self._clip.batches(frames, size, workers=default_workers()), self._timings, "read")

    def add(self, images: np.ndarray) -> None:
        """Encodes and prefills the next of `batches`.

        One segment is still being computed when this returns, so that the next one can be read and copied meanwhile.
        """
        for _ in self._add(images):
            pass

    def parts(self, images: np.ndarray) -> Iterator[None]:
        """`add` in parts, between which it yields, so that something else can be computed there.

        Nothing is still being computed when it yields and when it ends.
        """
        for computed in self._add(images):
            jax.block_until_ready(computed)
            yield
        jax.block_until_ready((self._tiles and self._tiles.tokens, self._prefill and self._prefill.cache))

    def _add(self, images: np.ndarray) -> Iterator[jax.Array]:
        """Encodes images, yields their visual tokens if these are prefilled next, and prefills them."""
        self._stages.begin()
        if self._prefill is None:
            self._add_tiles(images)
        else:
            yield from self._add_frames(images, self._prefill)
        self.done += len(images)

    def _add_tiles(self, tiles: np.ndarray) -> None:
        assert self._tiles is not None
        self._tiles.add(tiles)
        self._stages.end("vision", self._tiles.tokens)
        if self._tiles.filled == len(self._around.tiles):
            self._begin(self._tiles.tokens)

    def _add_frames(self, frames: np.ndarray, prefill: session.VideoPrefill) -> Iterator[jax.Array]:
        assert self._clip is not None
        shown = [i for i in self._wanted if self._frames <= i < self._frames + len(frames)]
        self._thumbnails += [(self._clip.times[i], resize(frames[i - self._frames], THUMBNAIL_SIZE)) for i in shown]
        self._frames += len(frames)
        visual = session.encode(self._network, self._plan, frames)
        self._stages.end("vision", visual)
        yield visual
        self._stages.begin()
        prefill.add(visual, len(frames) // FRAMES_PER_GROUP)
        self._stages.end("prefill", prefill.cache)
        if self._previous is not None:
            jax.block_until_ready(self._previous)  # a third segment would only hold memory
        self._previous = visual

    def finish(self) -> WatchedVideo:
        """The watched video. Raises UserError where its KV is not finite."""
        assert self._prefill is not None
        self._stages.begin()
        self._prefill.add_globals(self._around.after)
        self._stages.end("prefill", self._prefill.cache)
        kv = self._prefill.finish()
        compute = time.perf_counter() - self._started - self._timings["read"]
        self._timings |= self._stages.seconds if self._stages.measured else {"compute": compute}
        if self._cache.offload and kv.layout.groups:
            kv.cache, kv.host = to_host(kv.cache, self._plan.visual_start)
        return WatchedVideo(
            path=", ".join(self._around.names) if self._clip is None else str(self._clip.path),
            duration=0.0 if self._clip is None else self._clip.duration,
            times=[] if self._clip is None else self._clip.times[: self._frames],
            kv=kv,
            timings=self._timings,
            thumbnails=self._thumbnails,
            head_copies=self._network.head_copies,
            lead=self._around.lead,
            picture_tokens=self._around.picture_tokens,
        )
