"""Making a TrainState on a mesh, keeping it on disk, and writing the result for PyTorch."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from xl2jax.checkpoint import DTYPE_NAMES, read_params, write_torch
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.layers import LoRAConfig
from xl2jax.model import VideoXL2, abstract_model
from xl2jax.names import Entry, entries, flatten
from xl2jax.tensor_files import DTYPES
from xl2jax.training.sharding import param_sharding, replicated
from xl2jax.training.step import Params, StepConfig, TrainState

_CHECKPOINTS = "checkpoints"


def parameter_shapes(config: VideoXL2Config, lora: LoRAConfig | None) -> dict[str, jax.ShapeDtypeStruct]:
    """All parameters by dotted name, adapters included; costs no memory."""
    return flatten(nnx.state(abstract_model(config, jnp.float32, lora)))  # type: ignore[return-value]


def abstract_state(
    shapes: Mapping[str, jax.ShapeDtypeStruct], tx: optax.GradientTransformation, dtype: str, mesh: Mesh
) -> TrainState:
    """The TrainState of the named parameters as shapes with shardings: optimizer state lies as its parameter does."""
    params = {
        n: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype), sharding=param_sharding(n, s.shape, mesh))
        for n, s in shapes.items()
    }

    def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = getattr(path[-1], "key", None) if path else None
        sharding = params[name].sharding if name in params else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step, params, opt_state)  # type: ignore[arg-type]


def load_parameters(
    folder: Path, config: StepConfig, trained: Mapping[str, str], mesh: Mesh, seed: int, wanted: Collection[str],
    *, progress: bool,
) -> Params:  # fmt: skip
    """The `wanted` parameters, each put on the mesh in slices as it is read from a checkpoint; adapters are new.

    `trained` gives the dtype of what trains; the rest has the compute dtype.
    """

    def place(name: str, array: np.ndarray) -> jax.Array:
        dtype = DTYPES[DTYPE_NAMES[trained.get(name, config.compute_dtype)]]
        sharding = param_sharding(name, array.shape, mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].astype(dtype))

    read = read_params(folder, "float32", progress=progress, wanted=lambda name: name in wanted)
    params = {name: place(name, array) for name, array in read}
    shapes = parameter_shapes(config.model, config.lora)
    new = {n: shapes[n] for n in wanted if n not in params}
    if new:

        def make() -> Params:
            model = VideoXL2(config.model, param_dtype=jnp.float32, rngs=nnx.Rngs(seed), lora=config.lora)
            flat = flatten(nnx.state(model))
            return {n: flat[n].astype(trained[n]) for n in new}

        params |= jax.jit(make, out_shardings={n: param_sharding(n, s.shape, mesh) for n, s in new.items()})()
    return params


def new_state(params: Params, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Step 0; optimizer state is made in place on the mesh."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)


class Checkpoints:
    """The training checkpoints of a run: newest kept, written beside and renamed when whole (Orbax)."""

    def __init__(self, output: Path, keep: int):
        self._checkpointer = ocp.training.Checkpointer(
            (output / _CHECKPOINTS).absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, identity: Mapping[str, Any]) -> None:
        """Starts a save; the state may be donated as soon as this returns. `identity` is kept beside it."""
        self._checkpointer.wait()
        self._checkpointer.save_async(int(state.step), state, force=True, custom_metadata=dict(identity))

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, in slices on the mesh, and what was kept beside it."""
        newest = self._checkpointer.latest
        assert newest is not None
        where = self._checkpointer.directory / str(newest.step)
        try:
            metadata = self._checkpointer.metadata(newest)
            state = self._checkpointer.load(newest, abstract)
        except Exception as e:  # Orbax raises what its storage raises
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(f"{where}: cannot be read ({reason}); remove it to go on from the one before") from None
        return state, dict(metadata.custom_metadata or {})

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._checkpointer.close()


def merge_adapters(params: Params, lora: LoRAConfig) -> Params:
    """Parameters with every adapter added to its kernel and dropped, in float32 where one was."""
    out = {n: p for n, p in params.items() if n.rpartition(".")[2] not in ("lora_a", "lora_b")}

    @functools.partial(jax.jit, donate_argnums=0)
    def merged(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        low = jnp.einsum("lnr,lrm->lnm", *(x.astype(jnp.float32) for x in (a, b)), precision="highest")
        return kernel.astype(jnp.float32) + lora.alpha / lora.rank * low

    for name in [n for n in params if n.endswith(".lora_a")]:
        base = name.removesuffix(".lora_a")
        out[f"{base}.kernel"] = merged(out[f"{base}.kernel"], params[name], params[f"{base}.lora_b"])
    return out


def export(target: Path, config: StepConfig, params: Params, dtype: str, companions: Path) -> None:
    """Writes upstream's PyTorch layout, tokenizer and configs from `companions`. Process 0 writes, all take part."""
    if config.lora is not None:
        params = merge_adapters(params, config.lora)
    held: dict[str, np.ndarray] = {}  # one stacked parameter at a time

    def fetch(name: str) -> np.ndarray:
        if name not in held:
            held.clear()
            array = params[name]
            held[name] = np.asarray(
                array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
            )
        return held[name]

    def read(entry: Entry) -> np.ndarray:
        array = fetch(entry.param)
        return (array if entry.layer is None else array[entry.layer]).astype(DTYPES[DTYPE_NAMES[dtype]])

    if jax.process_index() == 0:
        write_torch(target, config.model, read, dtype, companions=companions, progress=True)
    else:
        for name in _export_order(config.model):
            fetch(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")


def _export_order(config: VideoXL2Config) -> list[str]:
    """Stacked parameters in the order in which write_torch reads them."""
    return list(dict.fromkeys(e.param for e in entries(config)))


def write_json(path: Path, value: Any) -> None:
    """Written beside, then renamed."""
    beside = path.with_name(f".{path.name}.incomplete")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)
