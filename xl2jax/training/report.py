"""Tables for --dry-run (the plan of a run) and --validate-data (the state of the data)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xl2jax.arithmetic import ceil_div
from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.models.param_tree import is_quantized, parameter_count
from xl2jax.models.sharding import param_spec
from xl2jax.training.batches import Probe
from xl2jax.training.config import TrainConfig
from xl2jax.training.records import Record, RecordSet
from xl2jax.training.sharding import batch_devices
from xl2jax.training.step import MASTER, StepConfig

_PARTS = ("vision", "dts", "projector", "llm")


def _share(name: str, shape: tuple[int, ...], mesh: Mesh) -> float:
    """Number of elements of a parameter on one device."""
    split = math.prod(mesh.shape[a] for a in param_spec(name, shape, mesh) if a is not None)
    return math.prod(shape) / split


def memory_per_device(
    config: TrainConfig,
    step: StepConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    trained: Sequence[str],
    mesh: Mesh,
    tiles: int = 0,
) -> dict[str, float]:
    """Bytes by purpose. `tiles`: of the pictures of a sample, at most.

    Activations are estimated for the longest sample: the values that remat stores, the intermediate values of one
    layer, and the logits of one block of tokens.
    """
    master, compute = jnp.dtype(MASTER).itemsize, jnp.dtype(config.compute_dtype).itemsize
    local = {n: _share(n, s.shape, mesh) for n, s in shapes.items()}
    training = sum(local[n] for n in trained)
    frozen = {n: shapes[n].dtype.itemsize if is_quantized(n) else compute for n in local.keys() - set(trained)}
    gradient = training * (2.0 if config.global_batch > config.micro_batch * batch_devices(mesh) else 1.0)
    return {
        "frozen parameters": sum(size * local[n] for n, size in frozen.items()),
        "master parameters": master * training,
        "optimizer state": 2 * master * training,
        "gradients": master * gradient,
        "compute copies": compute * training if master != compute else 0.0,
        "activations (estimate)": _activations(config, step.model, compute, tiles),
        **({"gathered parameters": _gathered(shapes, trained, compute, mesh)} if mesh.shape["fsdp"] > 1 else {}),
        **({"an unpacked layer": _unpacked(step.model, compute, mesh)} if step.model.llm.weights is not None else {}),
    }


def _gathered(shapes: Mapping[str, jax.ShapeDtypeStruct], trained: Sequence[str], itemsize: int, mesh: Mesh) -> float:
    """Bytes of what a device holds whole, but for `tensor`, while it computes: a layer of the LLM, all parameters outside
    the layers but the embedding, and the gradient of lm_head."""
    needed = 0.0
    for name, s in shapes.items():
        if name.startswith("llm.embed.") or name.startswith("vision.layers."):
            continue
        size = _share(name, s.shape, mesh) * (mesh.shape["fsdp"] if "fsdp" in param_spec(name, s.shape, mesh) else 1)
        size /= s.shape[0] if ".layers." in name else 1
        needed += size * (s.dtype.itemsize if is_quantized(name) else itemsize)
        needed += size * jnp.dtype(MASTER).itemsize if name == "llm.lm_head.kernel" and name in trained else 0
    return needed


def _unpacked(model: VideoXL2Config, itemsize: int, mesh: Mesh) -> float:
    """Bytes of one layer's matrices, and of lm_head, when quantised ones are unpacked."""
    t = model.llm
    layer = t.width * (3 * t.mlp_width + 2 * (t.heads + t.kv_heads) * t.head_width)
    return itemsize * (layer + t.width * t.vocab) / mesh.shape["tensor"]


def _activations(config: TrainConfig, model: VideoXL2Config, itemsize: int, tiles: int) -> float:
    v, t = model.vision, model.llm
    rows, tensor = config.micro_batch, config.tensor
    frames = max(config.max_frames // FRAMES_PER_GROUP * FRAMES_PER_GROUP, tiles) * rows
    patches, tokens = frames * v.patch_grid**2, rows * config.max_length
    vision_layer = patches * (4 * v.width + (2 * v.mlp_width + 4 * v.width) / tensor)
    llm_layer = tokens * (4 * t.width + (3 * t.mlp_width + 3 * t.heads * t.head_width) / tensor)
    kept = float(patches * v.width * v.run_layers + tokens * t.width * t.layers)
    if not config.remat:
        kept = vision_layer * v.run_layers + llm_layer * t.layers
    return itemsize * (kept + max(vision_layer, llm_layer)) + 2 * 4 * rows * 256 * t.vocab / tensor


def plan_report(
    config: TrainConfig,
    step: StepConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    trained: Sequence[str],
    mesh: Mesh,
    data: RecordSet,
) -> str:
    """The plan as text: parameters by part, memory per device, and steps."""
    lines = [f"{'part':24} {'parameters':>14} {'trained':>14}"]
    chosen = set(trained)
    total = {n: parameter_count(n, s) for n, s in shapes.items()}
    for part in _PARTS:
        sizes = {n: size for n, size in total.items() if n.startswith(f"{part}.")}
        lines.append(f"{part:24} {sum(sizes.values()):14,} {sum(s for n, s in sizes.items() if n in chosen):14,}")
    everything, training = sum(total.values()), sum(total[n] for n in trained)
    lines.append(f"{'all':24} {everything:14,} {training:14,} ({training / everything:.1%})")
    most = max((columns * rows for columns, rows in step.model.picture_grids or ()), default=0)
    tiles = max(len(r.pictures) for r in data.records) * most
    memory = memory_per_device(config, step, shapes, trained, mesh, tiles)
    lines += ["", "memory per device"]
    lines += [f"{name:24} {size / 2**30:10.3f} GiB" for name, size in {**memory, "all": sum(memory.values())}.items()]
    micro = config.micro_batch * batch_devices(mesh)
    samples = len(data.records)
    steps = config.epochs * ceil_div(samples, config.global_batch)
    steps = min(steps, config.max_steps or steps)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines += [
        "",
        f"mesh                     {axes}",
        f"samples                  {samples:,} (if all can be read{'; packing makes fewer rows' * config.packing})",
        f"step                     {config.global_batch} rows = {config.global_batch // micro} micro-batches of {micro}",
        f"steps                    {steps:,} in {config.epochs} epochs",
    ]
    if data.malformed:
        lines.append(f"malformed records        {len(data.malformed):,} are skipped, for example {data.malformed[0]}")
    if config.preset == "stage1":
        lines.append("stage1                   trains DTS through the language loss (upstream's own is not public)")
    return "\n".join(lines)


def data_report(records: Sequence[Record], malformed: Sequence[str], probe: Probe) -> str:
    """The report of --validate-data: one line for each unusable record, then totals."""
    lines = [*malformed, *(f"sample {records[i].id}: {reason}" for i, reason in probe.problems.items())]
    good = [x for x in probe.lengths if x is not None]
    kinds = {k: sum(r.kind == k for r in records) for k in ("video", "image", "text")}
    if malformed:
        lines.append(f"{len(malformed)} malformed records")
    lines.append(f"{len(records)} samples ({', '.join(f'{n} {k}' for k, n in kinds.items() if n)})")
    lines.append(f"{len(good)} can be used, {len(probe.problems)} cannot, {len(probe.cut)} are cut at the length limit")
    if good:
        tokens, groups = [x.tokens for x in good], [x.groups for x in good]
        lines.append(f"tokens {min(tokens)} to {max(tokens)}, mean {sum(tokens) / len(good):.0f}")
        if tiles := [x.tiles for x in good if x.tiles]:
            lines.append(f"tiles of pictures {min(tiles)} to {max(tiles)}, mean {sum(tiles) / len(tiles):.1f}")
        lines.append(f"frames {4 * min(groups)} to {4 * max(groups)}, mean {4 * sum(groups) / len(good):.0f}")
    return "\n".join(lines)
