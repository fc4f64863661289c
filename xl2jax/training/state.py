"""Making a TrainState on a mesh, keeping it on disk, and writing the result for PyTorch."""

from __future__ import annotations

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

from xl2jax.checkpoint import ParamReader, read_params
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.layers import LoRAConfig
from xl2jax.model import VideoXL2, abstract_model
from xl2jax.names import Entry, entries, flatten
from xl2jax.tensor_files import DTYPE_NAMES, DTYPES
from xl2jax.torch_folder import write_torch
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


def merge_adapter(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig) -> np.ndarray:
    """Stacked kernels [L, n, m] with their adapters a [L, n, rank] and b [L, rank, m] added, float32."""
    return kernel.astype(np.float32) + np.float32(lora.alpha / lora.rank) * (
        a.astype(np.float32) @ b.astype(np.float32)
    )


def export(target: Path, config: StepConfig, params: Params, dtype: str, source: Path) -> None:
    """Writes upstream's PyTorch layout: what trained from `params`, all else as `source` has it, adapters merged.

    Tokenizer and configs are those of `source`. Process 0 writes, all take part.
    """
    main = jax.process_index() == 0
    frozen = ParamReader(source, "float32") if main else None

    def gathered(name: str) -> np.ndarray:
        array = params[name]
        whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(whole)

    def stacked(name: str) -> np.ndarray | None:
        """A parameter of all layers; only process 0 reads what did not train."""
        if name in params:
            return gathered(name)
        base = name.removesuffix(".kernel")
        adapter = (gathered(f"{base}.lora_a"), gathered(f"{base}.lora_b")) if f"{base}.lora_a" in params else None
        if frozen is None:
            return None
        array = frozen.read(name)
        if adapter is None or config.lora is None:
            return array
        return merge_adapter(array, adapter[0], adapter[1], config.lora)

    held: dict[str, np.ndarray | None] = {}  # one stacked parameter at a time

    def read(entry: Entry) -> np.ndarray:
        if entry.param not in held:
            held.clear()
            held[entry.param] = stacked(entry.param)
        array = held[entry.param]
        assert array is not None
        return (array if entry.layer is None else array[entry.layer]).astype(DTYPES[DTYPE_NAMES[dtype]])

    if main:
        write_torch(target, config.model, read, dtype, companions=source, progress=True)
    else:  # in the order in which write_torch reads
        for name in dict.fromkeys(e.param for e in entries(config.model)):
            stacked(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")


def write_json(path: Path, value: Any) -> None:
    """Written beside, then renamed."""
    beside = path.with_name(f".{path.name}.incomplete")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)
