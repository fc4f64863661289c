"""Meshes, and how parameters and batches are split over them.

The axes are `data` (copies of the model), `fsdp` (parameters and optimizer state are split, and gathered one layer at a
time) and `tensor` (heads and MLP columns are split). Batches are split over `data` and `fsdp` together.
"""

from __future__ import annotations

import fnmatch
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError

BATCH_AXES = ("data", "fsdp")

# The axis of a parameter (counted from the end) that `tensor` splits: columns of the projections into the heads and the
# MLP, rows of the projections out of them, and entries of the vocabulary.
_TENSOR = (
    (("*.layers.[qkv].kernel", "*.layers.gate.kernel", "*.layers.up.kernel", "*.layers.fc1.kernel"), -1),
    (("*.layers.[qkv].bias", "*.layers.fc1.bias", "*.layers.[qkv].lora_b", "*.gate.lora_b", "*.up.lora_b"), -1),
    (("*.layers.o.kernel", "*.layers.out.kernel", "*.layers.down.kernel", "*.layers.fc2.kernel"), -2),
    (("*.layers.o.lora_a", "*.layers.down.lora_a", "llm.embed.embedding"), -2),
    (("llm.lm_head.kernel",), -1),
    # Quantised matrices have outputs first. Their scales have an axis of inputs in 4 bits only.
    (("*.layers.[qkv].codes", "*.layers.gate.codes", "*.layers.up.codes", "llm.embed.codes", "llm.lm_head.codes"), -2),
    (("*.layers.o.codes", "*.layers.down.codes"), -1),
)


def make_mesh(fsdp: int | None, tensor: int) -> Mesh:
    """A mesh over all devices. The data axis gets the devices that `fsdp` and `tensor` leave; fsdp None leaves none.

    Raises:
      UserError: the number of devices is not divisible by the axes.
    """
    devices = jax.device_count()
    if tensor < 1 or devices % tensor:
        raise UserError(f"--tensor {tensor} does not divide {devices} devices")
    fsdp = devices // tensor if fsdp is None else fsdp
    if fsdp < 1 or devices // tensor % fsdp:
        raise UserError(f"--fsdp {fsdp} with --tensor {tensor} does not divide {devices} devices")
    shape = (devices // tensor // fsdp, fsdp, tensor)
    return jax.make_mesh(shape, (*BATCH_AXES, "tensor"), axis_types=(AxisType.Auto,) * 3)


def check_tensor(config: VideoXL2Config, tensor: int) -> None:
    """Raises UserError unless the numbers of heads and the widths are divisible by the tensor axis."""
    v, t = config.vision, config.llm
    sizes = {
        "KV heads": t.kv_heads,
        "LLM MLP width": t.mlp_width,
        "vision heads": v.heads,
        "vision MLP width": v.mlp_width,
    }
    bad = [f"{n} {what}" for what, n in sizes.items() if n % tensor]
    if bad:
        raise UserError(f"--tensor {tensor} does not divide {', '.join(bad)}")


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter with a dotted name is split. The layer axis is never split, and vectors only over `tensor`."""
    spec: list[str | None] = [None] * len(shape)
    for patterns, axis in _TENSOR:
        if any(fnmatch.fnmatchcase(name, p) for p in patterns) and shape[axis] % mesh.shape["tensor"] == 0:
            spec[axis] = "tensor"
    first = 1 if ".layers." in name else 0
    free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % mesh.shape["fsdp"] == 0]
    if len(shape) - first >= 2 and free:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def param_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of `param_spec`."""
    return NamedSharding(mesh, param_spec(name, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def split_batch(x: jax.Array) -> jax.Array:
    """Constrains the first axis to be split over the batch axes of the current mesh. Without a mesh it returns x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
