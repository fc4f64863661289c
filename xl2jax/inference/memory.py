"""How much memory a video will take, and whether that much is free."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import os
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from xl2jax.arithmetic import ceil_div
from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config, Weights
from xl2jax.errors import NotEnoughMemory, UserError
from xl2jax.inference.bilevel import BilevelConfig, mixed_slots
from xl2jax.inference.layout import VideoLayout, bucket
from xl2jax.inference.prefill import PrefillPlan, default_steps, global_tokens_at_once
from xl2jax.models.param_tree import flatten
from xl2jax.models.sharding import head_copies, shard_bytes, with_head_copies
from xl2jax.models.video_xl2 import abstract_model

_WORKSPACE = 256 << 20
"""Bytes for XLA's runtime and small temporaries."""


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a video needs beside the parameters."""

    cache: int
    """The dense KV while the video is watched."""
    kept: int
    """The part of it that stays on the device while questions are asked: all of it, unless the KV is offloaded."""
    pooled: int
    mixed: int
    """The mixed KV, and the chunks that are fetched for it where the KV is offloaded."""
    workspace: int

    @property
    def total(self) -> int:
        return max(self.cache, self.kept + self.pooled + self.mixed) + self.workspace


def weight_bytes(config: VideoXL2Config, dtype: jax.typing.DTypeLike, tensor: int = 1) -> int:
    """Bytes of the parameters on each of `tensor` devices. Those that are not quantised have `dtype`."""
    params = flatten(nnx.state(abstract_model(with_head_copies(config, head_copies(config, tensor)), jnp.dtype(dtype))))
    return sum(shard_bytes(name, x, tensor) for name, x in params.items())


def weight_bytes_of_a_token(config: VideoXL2Config, dtype: jax.typing.DTypeLike, tensor: int = 1) -> int:
    """Bytes of the parameters that one token of an answer reads on each of `tensor` devices: the LLM's, but for an
    embedding of its own."""
    params = flatten(nnx.state(abstract_model(with_head_copies(config, head_copies(config, tensor)), jnp.dtype(dtype))))
    separate = not config.llm.tied_embeddings
    return sum(
        shard_bytes(name, x, tensor)
        for name, x in params.items()
        if name.startswith("llm.") and not (separate and name.startswith("llm.embed."))
    )


def slot_bytes(
    config: VideoXL2Config,
    dtype: jax.typing.DTypeLike,
    *,
    quantized: bool = False,
    key_channels: int = 0,
    tensor: int = 1,
) -> int:
    """Bytes of the keys and values of one token in all layers, on each of `tensor` devices.

    In 8 bits `key_channels` of each key keep `dtype` too.
    """
    c, itemsize = config.llm, jnp.dtype(dtype).itemsize
    kv_heads = ceil_div(c.kv_heads, tensor)
    if not quantized:
        return 2 * c.layers * kv_heads * c.head_width * itemsize
    return c.layers * kv_heads * (2 * (c.head_width + itemsize) + key_channels * itemsize)


def memory_need(
    config: VideoXL2Config,
    plan: PrefillPlan,
    layout: VideoLayout,
    bilevel: BilevelConfig | None,
    dtype: jax.typing.DTypeLike,
    platform: str,
    *,
    quantized: bool = False,
    key_channels: int = 0,
    offload: bool = False,
    tensor: int = 1,
    tiles: int = 0,
) -> MemoryNeed:
    """The memory of the video cache and, where `bilevel` is given, of its pooled and mixed copies, on each of `tensor`
    devices.

    `tiles`: of all pictures. Their visual tokens are kept until everything is prefilled.

    `quantized` and `offload` are those of `CacheConfig`, `key_channels` those of `slot_bytes`. `platform` is "cpu" or "gpu". On a CPU offloading frees
    nothing, because the device is the host.
    """
    gpu = platform == "gpu"
    c, v, itemsize = config.llm, config.vision, jnp.dtype(dtype).itemsize
    slot = slot_bytes(config, dtype, tensor=tensor)
    kept_slot = slot_bytes(config, dtype, quantized=quantized, key_channels=key_channels, tensor=tensor)
    cache = kept = plan.slots * kept_slot
    pooled = mixed = 0
    if offload and gpu:
        kept = plan.visual_start * kept_slot
    if bilevel is not None and layout.groups:
        pooled = plan.group_capacity * (plan.visual_tokens // bilevel.pool) * slot
        # Chunks are scored on the dense cache, or on an all-pooled cache that is freed before the mixed one is made.
        dense = min((bilevel.top(layout) + 2) * bilevel.select_chunk_groups, layout.groups)
        mixed = mixed_slots(layout, dense, bilevel) * kept_slot
        if offload:
            mixed += (plan.visual_start + bucket(dense) * plan.visual_tokens) * kept_slot
    tokens = plan.step_groups * (plan.visual_tokens + plan.time_cap) if layout.groups else 0
    tokens = max(tokens, min(max(plan.prefix_cap, bucket(layout.tail, 32)), global_tokens_at_once(platform)))
    # The hidden states of a whole segment are part of the result.
    prefill = tokens * (4 * c.mlp_width // tensor + (8 + plan.segment_steps) * c.width) * itemsize
    if c.weights is not None:  # the matrices of one layer are unpacked
        prefill += c.width * (3 * c.mlp_width + 2 * (c.heads + c.kv_heads) * c.head_width) * itemsize // tensor
    # Devices share the frames of a video, and each encodes all tiles.
    at_once = default_steps(platform)[0] if tiles else ceil_div(default_steps(platform)[0], tensor)
    patches = FRAMES_PER_GROUP * at_once * v.patch_grid**2
    # XLA materialises the scores of all heads of a frame; cuDNN does not.
    scores = 0 if gpu else 2 * v.heads * v.patch_grid**2 * 4
    vision = patches * ((2 * v.mlp_width + 8 * v.width) * itemsize + scores)
    # One layer of the cache is in float32 while it is pooled or gathered.
    gathered = quantized or (bilevel is not None and layout.groups)
    layer = 2 * plan.slots * ceil_div(c.kv_heads, tensor) * c.head_width * 4 if gathered else 0
    prefill += layer if quantized else 0
    pictures = bucket(tiles + default_steps(platform)[0]) * config.tile_tokens * c.width * itemsize if tiles else 0
    return MemoryNeed(cache, kept, pooled, mixed, _WORKSPACE + pictures + max(prefill, vision, layer))


class Choices(NamedTuple):
    """The settings on which the memory of a video and of the model depends."""

    bilevel: BilevelConfig | None
    quantized: bool
    offload: bool
    weights: Weights | None


def smaller_options(now: Choices, visual_tokens: int) -> dict[str, Choices]:
    """Settings that need less memory, by the flags of infer.py that they add to `now`.

    Single flags come first, and of those the one that costs least accuracy and time. Weights in 4 bits come last.
    """
    steps: dict[str, Choices] = {}
    if now.weights is None:
        steps["--weights int8"] = now._replace(weights="int8")
    if now.bilevel is not None and now.bilevel.pool < visual_tokens:
        pool = min(4 * now.bilevel.pool, visual_tokens)
        steps[f"--pool {pool}"] = now._replace(bilevel=dataclasses.replace(now.bilevel, pool=pool))
    if not now.quantized:
        steps["--cache-dtype int8"] = now._replace(quantized=True)
    if now.bilevel is not None and not now.offload:
        steps["--offload"] = now._replace(offload=True)

    def combined(joined: list[str], sizes: Iterable[int]) -> dict[str, Choices]:
        found = {}
        for size in sizes:
            for flags in itertools.combinations(joined, size):
                changed = {k: v for f in flags for k, v in steps[f]._asdict().items() if v != getattr(now, k)}
                found[" ".join(flags)] = now._replace(**changed)
        return found

    rest = [flags for flags in steps if "--pool" not in flags]
    out = steps | combined(rest, range(2, len(rest) + 1))
    if now.weights != "int4":
        beside = combined([flags for flags in rest if "--weights" not in flags], range(3))
        out |= {f"--weights int4 {f}".strip(): choices._replace(weights="int4") for f, choices in beside.items()}
    return out


def simplest(fitting: Iterable[str]) -> list[str]:
    """Flags that fit, without those that only add flags to others before them, and with 4 bits only as the last resort."""

    def parts(flags: str) -> set[str]:
        return {part.strip() for part in flags.split("--")}

    out: list[str] = []
    for flags in fitting:
        more = any(parts(earlier) <= parts(flags) for earlier in out)
        if not more and not ("int4" in flags and out and "int4" not in out[0]):
            out.append(flags)
    return out


def available_bytes(*meshes: Mesh | None) -> int:
    """Free bytes of the default device, or of the fullest device of the meshes: what XLA may still take there.

    For CPUs it is the free memory of the host, which the devices of all meshes share.
    """
    devices = [device for mesh in meshes or (None,) for device in _devices(mesh)]
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in each for each in stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return _free_host_bytes() // len(devices)


def _devices(mesh: Mesh | None) -> list[jax.Device]:
    """Those of a mesh that belong to this process."""
    return jax.devices()[:1] if mesh is None else list(mesh.local_devices)


def _free_host_bytes() -> int:
    free = []
    with contextlib.suppress(OSError, KeyError, ValueError), open("/proc/meminfo") as f:
        fields = dict(line.split(":", 1) for line in f)
        free.append(int(fields["MemAvailable"].split()[0]) << 10)
    with contextlib.suppress(OSError, ValueError, KeyError):  # the limit of a container; "max" means that there is none
        limit, used = (int(Path("/sys/fs/cgroup", n).read_text()) for n in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free.append(limit - used + int(counts["inactive_file"]))  # files that the kernel keeps until memory is short
    return min(free) if free else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(
    layout: VideoLayout,
    need_of: Callable[[VideoLayout], MemoryNeed],
    others: Callable[[], Mapping[str, int]] = dict,
    *,
    held: int = 0,
    mesh: Mesh | None = None,
) -> None:
    """Raises NotEnoughMemory, a UserError, if a video needs more memory than is free.

    The message says how many frames would fit, and with which of `others()` (flags -> bytes for the same video) all would.
    `held`: bytes of other watched videos, which could be closed. All bytes are those of one device of `mesh`.
    """
    free, need = available_bytes(mesh), need_of(layout)
    if need.total <= free:
        return

    if not layout.groups:
        raise NotEnoughMemory(
            f"the pictures need {need.total / 2**30:.2f} GiB{each_of(mesh)} beside the model "
            f"(KV cache {need.cache / 2**30:.2f}), {free / 2**30:.2f} GiB are free: give fewer or smaller pictures"
        )

    def fits(groups: int) -> bool:
        return need_of(dataclasses.replace(layout, time_lengths=layout.time_lengths[:groups])).total <= free

    # Lengths are rounded up to buckets, but a longer video never needs less: bisection is right.
    groups = bisect.bisect_left(range(1, layout.groups), True, key=lambda g: not fits(g))
    frames = groups * FRAMES_PER_GROUP
    advice = [f"{frames} frames would fit (--max-frames {frames})" if frames else "not even 4 frames fit"]
    fitting = simplest(flags for flags, other in others().items() if other <= free)
    advice += [f"all fit with {' or '.join(fitting)}"] if fitting else []
    if held:
        enough = "all fit then" if need.total <= free + held else "which is not enough for all"
        advice.append(f"other watched videos hold {held / 2**30:.2f} GiB: close() them ({enough})")
    raise NotEnoughMemory(
        f"{layout.groups * FRAMES_PER_GROUP} frames need {need.total / 2**30:.2f} GiB{each_of(mesh)} beside the model "
        f"(KV cache {need.cache / 2**30:.2f}), {free / 2**30:.2f} GiB are free: {'; '.join(advice)}"
    )


def each_of(mesh: Mesh | None) -> str:
    """Says in a message that bytes are those of each device."""
    return "" if mesh is None or mesh.size == 1 else f" on each of {mesh.size} devices"


def check_weights_fit(config: VideoXL2Config, dtype: str, meshes: Sequence[Mesh | None] = (None,)) -> None:
    """Raises UserError if the parameters of a copy on each mesh need more memory than is free. The message says which bits
    would fit."""
    mesh = meshes[0]
    tensor = 1 if mesh is None else mesh.size
    free, need = available_bytes(*meshes), weight_bytes(config, dtype, tensor)
    if need <= free:
        return
    kinds: tuple[Weights, ...] = ("int8", "int4") if config.llm.weights is None else ()
    sizes = {kind: weight_bytes(config.with_weights(kind), dtype, tensor) for kind in kinds if config.can_have(kind)}
    fitting = next((kind for kind, size in sizes.items() if size <= free), None)
    advice = "" if fitting is None else f"; --weights {fitting} needs {sizes[fitting] / 2**30:.2f} GiB"
    raise UserError(f"the model needs {need / 2**30:.2f} GiB{each_of(mesh)}, {free / 2**30:.2f} GiB are free{advice}")


def used_bytes() -> int:
    """Bytes in use now, on the default device where it reports them, else by this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Bytes in use at the peak so far, on the fullest device where devices report them, else by this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks) if peaks else host_peak_bytes()


def host_peak_bytes() -> int:
    """Bytes of host memory that this process used at its peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
