"""Flags of the commands that answer chat requests, and the service that they describe."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from xl2jax.commands.flags import DEFAULT_CHECKPOINT, PrefillFlags, TensorFlags, require_checkpoint
from xl2jax.config import FRAMES_PER_GROUP, Weights
from xl2jax.errors import UserError, require_whole
from xl2jax.system.atomic import scratch_folder

if TYPE_CHECKING:
    from xl2jax.serving.limits import Limits, LiveLimits
    from xl2jax.serving.service import Service

PACKAGES = ("starlette", "uvicorn", "websockets", "httpcore2", "httpx2", "prometheus_client", "python_multipart")
"""Of the extra `serve`."""


@dataclasses.dataclass(frozen=True)
class MediaArgs:
    """Which videos may be read."""

    media_root: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A folder whose videos may be named by file:// addresses; may be given several times."""
    allow_media_domain: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A host from which videos may be downloaded, with those below it; may be given several times."""
    allow_any_media: bool = False
    """Videos may be downloaded from any public host."""


@dataclasses.dataclass(frozen=True)
class KeepArgs:
    """Where watched videos are kept."""

    cache_dir: Path | None = None
    """Folder for the KV of watched videos and for uploads, which a restart finds again; by default neither is kept."""
    device_gib: float | None = None
    """Memory of each device for the KV of watched videos; by default 60 % of what is free once the model is loaded."""
    host_gib: float = 0.0
    """Host memory for those that leave the device."""
    disk_gib: float = 100.0
    """Disk space for cache files, and as much again for uploads."""
    finish_abandoned: bool = False
    """Watches a video to its end when its clients have gone."""


@dataclasses.dataclass(frozen=True)
class LimitArgs:
    """Ceilings that hold whatever a request asks for."""

    max_queue: int = 64
    """Requests in the server at a time; further ones are answered with status 429."""
    max_answers: int = 8
    """Answers that are decoded at a time."""
    max_request_seconds: float = 3600.0
    """A request that is not answered by then ends with status 504."""
    max_fetch_seconds: float = 300.0
    """Time for the download of a video, and for the arrival of a request that is not an upload."""
    max_idle_seconds: float = 60.0
    """An upload of which nothing comes for so long, or from then on less than 8 KiB a second, ends with status 408; a
    connection without a request, or whose client takes nothing of an answer, is closed."""
    max_body_mib: int = 64
    """Size of a request that is not an upload."""
    max_video_mib: int = 8192
    """Size of a video file."""
    max_video_seconds: float = 21600.0
    """Length of a video."""
    max_frames: int = 1024
    """Frames that may be read from a video."""
    max_pictures: int = 16
    """Pictures of a conversation that are seen in tiles (treat_images_as pictures)."""
    max_frame_pixels: int = 33_177_600
    """Pixels of a frame of the file."""
    max_text: int = 65_536
    """Characters of a question with its history."""
    max_new_tokens: int = 4096
    """Tokens of an answer."""


@dataclasses.dataclass(frozen=True)
class ComputeArgs:
    """Settings that trade accuracy for memory and time."""

    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """dtype of parameters, KV and activations; by default that of the checkpoint."""
    weights: Weights | None = None
    """Quantises the LLM's matrices to 8 or 4 bits on loading; by default they are as the checkpoint stores them."""
    window_chunks: int | Literal["all"] = 3
    """How many chunks (of 16 frames) before its own a visual token sees during prefill; all is dense prefill."""
    pool: int = 4
    """How many visual tokens are averaged into one in chunks that do not stay dense."""
    cache_dtype: Literal["int8"] | None = None
    """Keeps the KV of videos in 8 bits, with a scale for each token and head."""


@dataclasses.dataclass(frozen=True)
class ServiceArgs:
    """The model, and how requests are answered."""

    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """Orbax folder, PyTorch folder or hub id (BAAI/Video-XL-2)."""
    model_name: str | None = None
    """Name of the model for clients; by default the last part of --checkpoint."""
    media: tyro.conf.OmitArgPrefixes[MediaArgs] = MediaArgs()
    keep: tyro.conf.OmitArgPrefixes[KeepArgs] = KeepArgs()
    limits: tyro.conf.OmitArgPrefixes[LimitArgs] = LimitArgs()
    compute: tyro.conf.OmitArgPrefixes[ComputeArgs] = ComputeArgs()
    split: tyro.conf.OmitArgPrefixes[TensorFlags] = dataclasses.field(default_factory=TensorFlags)


def check_service(args: ServiceArgs) -> None:
    """Raises UserError for all errors that can be seen before anything is loaded."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this command needs further packages ({', '.join(missing)}): pip install 'xl2jax[serve]'")
    require_checkpoint(args.checkpoint)
    args.split.devices()  # raises UserError for numbers out of range
    media, limits, keep = args.media, args.limits, args.keep
    for root in media.media_root:
        if not root.is_dir():
            raise UserError(f"--media-root {root}: no such folder")
    if media.allow_any_media and media.allow_media_domain:
        raise UserError("--allow-any-media and --allow-media-domain exclude each other: leave one out")
    for name in ("max_queue", "max_answers", "max_body_mib", "max_video_mib", "max_text", "max_new_tokens"):
        require_whole(f"--{name.replace('_', '-')}", getattr(limits, name), 1)
    require_whole("--max-frames", limits.max_frames, FRAMES_PER_GROUP)
    require_whole("--max-pictures", limits.max_pictures, 1, 1024)
    require_whole("--max-frame-pixels", limits.max_frame_pixels, 1, 1 << 27)
    for name in ("max_request_seconds", "max_fetch_seconds", "max_idle_seconds", "max_video_seconds"):
        if not 0 < getattr(limits, name) < 1e9:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    for name in ("device_gib", "host_gib", "disk_gib"):
        value = getattr(keep, name)
        if value is not None and not 0 <= value < 1e6:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more")


def spool_folder(name: str) -> contextlib.AbstractContextManager[Path]:
    """A folder for the files of requests. It lies where temporary files do, and what a killed server left is removed."""
    return scratch_folder(Path(tempfile.gettempdir()), f"{name}-{os.getuid()}")


def limits_of(given: LimitArgs) -> Limits:
    """The flags as the server's limits."""
    from xl2jax.serving.limits import Limits

    return Limits(
        queue=given.max_queue,
        answers=given.max_answers,
        request_seconds=given.max_request_seconds,
        fetch_seconds=given.max_fetch_seconds,
        idle_seconds=given.max_idle_seconds,
        body_bytes=given.max_body_mib << 20,
        video_bytes=given.max_video_mib << 20,
        video_seconds=given.max_video_seconds,
        frames=given.max_frames,
        pictures=given.max_pictures,
        frame_pixels=given.max_frame_pixels,
        text_characters=given.max_text,
        new_tokens=given.max_new_tokens,
    )


def build_service(
    args: ServiceArgs, spool: Path, warm_up_frames: int = 0, live_limits: LiveLimits | None = None
) -> Service:
    """Loads the model and builds the server around it. `warm_up_frames`: see `serve --warm-up`. `live_limits`: by default
    there are no live videos."""
    import xl2jax
    from xl2jax.checkpoint.params import stored_config
    from xl2jax.checkpoint.sources import find_checkpoint
    from xl2jax.inference import memory
    from xl2jax.inference.bilevel import BilevelConfig
    from xl2jax.inference.selection import check_pool
    from xl2jax.inference.video_cache import CacheConfig
    from xl2jax.serving.addresses import Downloads
    from xl2jax.serving.engine import Engine
    from xl2jax.serving.live import LiveSessions
    from xl2jax.serving.media import Library, MediaRules
    from xl2jax.serving.metrics import Metrics
    from xl2jax.serving.partial import PartialUploads
    from xl2jax.serving.service import Service
    from xl2jax.serving.uploads import Uploads
    from xl2jax.serving.videos import Budgets, WatchedVideos
    from xl2jax.serving.warm_up import warm_up
    from xl2jax.system.backend import start_backend

    media, keep, compute = args.media, args.keep, args.compute
    limits = limits_of(args.limits)
    if live_limits is not None:
        limits = dataclasses.replace(limits, live=live_limits)
    bilevel, cache = BilevelConfig(pool=compute.pool), CacheConfig(compute.cache_dtype)
    prefill = PrefillFlags(window_chunks=compute.window_chunks).config()
    try:
        kept = keep.cache_dir or spool
        uploads = Uploads(kept / "uploads", limits.video_bytes, int(keep.disk_gib * 2**30))
        partial = PartialUploads(kept / "parts", uploads)
        folder = None if keep.cache_dir is None else keep.cache_dir / "videos"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--cache-dir {keep.cache_dir}: cannot be written ({e.strerror})") from None
    checkpoint = find_checkpoint(args.checkpoint)
    config = stored_config(checkpoint, compute.weights)
    check_pool(bilevel, config.visual_tokens)
    args.split.devices().check(config)
    start_backend()
    model = xl2jax.load(
        checkpoint, dtype=compute.dtype, weights=compute.weights, progress=True, tensor=args.split.tensor
    )
    model.check_cache(cache, bilevel)
    device = (
        int(0.6 * memory.available_bytes(model.network.mesh))
        if keep.device_gib is None
        else int(keep.device_gib * 2**30)
    )
    metrics = Metrics()
    videos = WatchedVideos(
        model,
        Budgets(device, int(keep.host_gib * 2**30), int(keep.disk_gib * 2**30)),
        folder,
        metrics,
        prefill=prefill,
        cache=cache,
    )
    downloads = None
    if media.allow_any_media or media.allow_media_domain:
        domains = None if media.allow_any_media else tuple(d.lower().strip(".") for d in media.allow_media_domain)
        downloads = Downloads(domains, limits.video_bytes, limits.fetch_seconds)
    live = LiveSessions(model, videos, limits, metrics, bilevel=bilevel)
    work = spool / "requests"
    work.mkdir()
    name = args.model_name or args.checkpoint.rstrip("/").rpartition("/")[2].partition("@")[0] or "video-xl-2"
    return Service(
        model=name,
        tokenizer=model.tokenizer,
        engine=Engine(
            model,
            videos,
            limits,
            metrics,
            live,
            finish_abandoned=keep.finish_abandoned,
            warm_up=functools.partial(
                warm_up, model, warm_up_frames, limits.answers, prefill=prefill, cache=cache, bilevel=bilevel
            )
            if warm_up_frames
            else None,
        ),
        videos=videos,
        library=Library(MediaRules(media.media_root, downloads), limits, uploads, work),
        uploads=uploads,
        partial=partial,
        live=live,
        limits=limits,
        metrics=metrics,
        bilevel=bilevel,
    )
