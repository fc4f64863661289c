"""The meshes of training, and how batches are split over them.

Batches are split over the axes `data` and `fsdp` together. How parameters are split is in `xl2jax.models.sharding`.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError

BATCH_AXES = ("data", "fsdp")


def make_mesh(fsdp: int | None, tensor: int, count: int | None = None) -> Mesh:
    """A mesh over the first `count` devices, by default all. The data axis gets the devices that `fsdp` and `tensor`
    leave; fsdp None leaves none.

    Raises:
      UserError: the number of devices is not divisible by the axes.
    """
    devices = jax.device_count() if count is None else count
    if not 1 <= devices <= jax.device_count():
        raise UserError(f"--devices {devices}: {jax.device_count()} are there")
    if tensor < 1 or devices % tensor:
        raise UserError(f"--tensor {tensor} does not divide {devices} devices")
    fsdp = devices // tensor if fsdp is None else fsdp
    if fsdp < 1 or devices // tensor % fsdp:
        raise UserError(f"--fsdp {fsdp} with --tensor {tensor} does not divide {devices} devices")
    shape = (devices // tensor // fsdp, fsdp, tensor)
    names, types = (*BATCH_AXES, "tensor"), (AxisType.Auto,) * 3
    return jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:devices])


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def _current_mesh() -> AbstractMesh | None:
    """The mesh of training that is current, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(BATCH_AXES) <= set(mesh.axis_names) else None


def batch_parts(rows: int) -> int:
    """Number of parts that the current mesh splits so many rows into: 1 without a mesh, and where it does not divide."""
    mesh = _current_mesh()
    parts = 1 if mesh is None else batch_devices(mesh)
    return parts if rows % parts == 0 else 1


def split_batch(x: jax.Array) -> jax.Array:
    """Constrains the first axis to be split over the batch axes of the current mesh. Without a mesh it returns x.

    The others stay as they are: heads may be split over `tensor`.
    """
    if _current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))
