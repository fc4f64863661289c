"""Creates a TrainState on a mesh, saves and restores it, and exports the result for PyTorch."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
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

from xl2jax.checkpoint.orbax_folder import ignore_closed_loops
from xl2jax.checkpoint.param_names import Entry, entries
from xl2jax.checkpoint.params import ParamReader
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES
from xl2jax.checkpoint.torch_folder import write_torch
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError, first_line
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.param_tree import flatten, is_quantized
from xl2jax.models.sharding import param_sharding, replicated
from xl2jax.models.video_xl2 import VideoXL2, abstract_model
from xl2jax.system.schema import check
from xl2jax.system.terminal import machine_fault
from xl2jax.training.processes import from_main
from xl2jax.training.step import MASTER, Params, StepConfig, TrainState

_CHECKPOINTS = "checkpoints"


def parameter_shapes(config: VideoXL2Config, lora: LoRAConfig | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all parameters by dotted name, including adapters. Allocates nothing."""
    return flatten(nnx.state(abstract_model(config, jnp.float32, lora)))  # type: ignore[return-value]


def abstract_state(
    shapes: Mapping[str, jax.ShapeDtypeStruct], tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The TrainState as shapes with shardings. The optimizer state of a parameter is split as the parameter is."""
    params = {
        n: jax.ShapeDtypeStruct(s.shape, jnp.dtype(MASTER), sharding=param_sharding(n, s.shape, mesh))
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
    folder: Path,
    config: StepConfig,
    trained: Collection[str],
    mesh: Mesh,
    seed: int,
    wanted: Collection[str],
    *,
    progress: bool,
) -> Params:
    """Reads the `wanted` parameters of a checkpoint, and puts each on the mesh as it is read. Adapters are initialised.

    Parameters in `trained` have the dtype `MASTER`, the others the compute dtype; parts of quantised matrices keep theirs.
    """

    def place(name: str, array: np.ndarray) -> jax.Array:
        dtype = DTYPES[DTYPE_NAMES[MASTER if name in trained else config.compute_dtype]]
        dtype = array.dtype if is_quantized(name) else dtype
        sharding = param_sharding(name, array.shape, mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].astype(dtype))

    reader = ParamReader(folder, "float32", config.model.llm.weights)
    read = reader.read_all(progress=progress, wanted=lambda name: name in wanted)
    params = {name: place(name, array) for name, array in read}
    shapes = parameter_shapes(config.model, config.lora)
    new = {n: shapes[n] for n in wanted if n not in params}
    if new:

        def make() -> Params:
            model = VideoXL2(config.model, param_dtype=jnp.float32, rngs=nnx.Rngs(seed), lora=config.lora)
            flat = flatten(nnx.state(model))
            return {n: flat[n] for n in new}

        params |= jax.jit(make, out_shardings={n: param_sharding(n, s.shape, mesh) for n, s in new.items()})()
    return params


def new_state(params: Params, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state at step 0. The optimizer state is created on the mesh."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)


class Checkpoints:
    """The training checkpoints of a run, written by Orbax. Only the newest `keep` are kept.

    A checkpoint appears under its name when it is complete.

    Raises:
      UserError: a checkpoint cannot be written. Earlier checkpoints are unchanged.
    """

    def __init__(self, output: Path, keep: int):
        self._folder = output / _CHECKPOINTS
        # Each of Orbax's threads would log a traceback of the error that is raised here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_closed_loops()
        with self._one_line():
            self._checkpointer = ocp.training.Checkpointer(
                self._folder.absolute(),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # Orbax raises many types, depending on its storage
            reason = "no space left on the disk" if "No space left on device" in str(e) else first_line(e)
            raise machine_fault(e) or UserError(
                f"{self._folder}: cannot be written ({reason}); the last complete checkpoint is unchanged"
            ) from e

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, identity: Mapping[str, Any]) -> None:
        """Starts a save of the state and its identity. The state may be donated as soon as this returns."""
        self.wait()
        from_main(lambda: self._check_room(state))
        with self._one_line():
            self._checkpointer.save_async(int(state.step), state, force=True, custom_metadata=dict(identity))

    def _check_room(self, state: TrainState) -> None:
        need = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise UserError(
                f"{self._folder}: a checkpoint needs {need / 1e9:.3f} GB, {free / 1e9:.3f} GB are free there; "
                "the last complete checkpoint is unchanged"
            )

    def wait(self) -> None:
        """Waits until the last save is complete on the disk."""
        with self._one_line():
            self._checkpointer.wait()

    def identity(self) -> dict[str, str] | None:
        """The identity that was saved with the newest state, or None if there is no state."""
        newest = self._checkpointer.latest
        if newest is None:
            return None
        with self._readable(newest.step) as where:
            stored = self._checkpointer.metadata(newest).custom_metadata
            return check(stored or {}, dict[str, str], where)

    def restore(self, abstract: TrainState) -> TrainState:
        """Reads the newest state onto the mesh."""
        newest = self._checkpointer.latest
        assert newest is not None
        with self._readable(newest.step):
            return self._checkpointer.load(newest, abstract)

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[Path]:
        where = self._folder / str(step)
        try:
            yield where
        except Exception as e:
            raise machine_fault(e) or UserError(
                f"{where}: cannot be read ({first_line(e)}); remove it to resume from the checkpoint before"
            ) from e

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._one_line():
                self._checkpointer.close()
        except UserError:
            if value is None:
                raise  # otherwise the exception in progress says more


def merge_adapter(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig) -> np.ndarray:
    """Adds adapters a [L, n, rank] and b [L, rank, m] to stacked kernels [L, n, m]. Returns float32."""
    return kernel.astype(np.float32) + np.float32(lora.alpha / lora.rank) * (
        a.astype(np.float32) @ b.astype(np.float32)
    )


def export(target: Path, config: StepConfig, params: Params, dtype: str, source: Path) -> None:
    """Writes the model in upstream's PyTorch layout, with adapters merged into their weights.

    Trained parameters come from `params`; everything else, including config and tokenizer, from the checkpoint
    `source`. Matrices that were quantised in training are the unpacked ones, which the adapters were trained with.
    Process 0 writes, but all processes must call this.
    """
    main = jax.process_index() == 0
    frozen = ParamReader(source, "float32", config.model.llm.weights) if main else None

    def gathered(name: str) -> np.ndarray:
        array = params[name]
        whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(whole)

    def stacked(name: str) -> np.ndarray | None:
        """A parameter of all layers. Frozen parameters are read only in process 0."""
        if name in params:
            return gathered(name)
        base = name.removesuffix(".kernel")
        adapter = (gathered(f"{base}.lora_a"), gathered(f"{base}.lora_b")) if f"{base}.lora_a" in params else None
        if frozen is None:
            return None
        array = frozen.plain(name)
        if adapter is None or config.lora is None:
            return array
        return merge_adapter(array, adapter[0], adapter[1], config.lora)

    current: dict[str, np.ndarray | None] = {}  # holds one stacked parameter at a time

    def read(entry: Entry) -> np.ndarray:
        if entry.param not in current:
            current.clear()
            current[entry.param] = stacked(entry.param)
        array = current[entry.param]
        assert array is not None
        return (array if entry.layer is None else array[entry.layer]).astype(DTYPES[DTYPE_NAMES[dtype]])

    if main:
        write_torch(target, config.model, read, dtype, companions=source, progress=True)
    else:  # takes part in gathering, in the order in which write_torch reads
        for name in dict.fromkeys(e.param for e in entries(config.model)):
            stacked(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")
