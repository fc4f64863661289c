"""`bench train`: one optimizer step of the whole model on random weights, frames and tokens."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.bench.kernels import ceilings
from xl2jax.bench.setup import PREFIX, TIMES, timed
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, Weights
from xl2jax.errors import UserError, require_whole
from xl2jax.inference import memory
from xl2jax.inference.compiled import checksum
from xl2jax.models.param_tree import is_quantized
from xl2jax.models.sharding import param_sharding
from xl2jax.training.batches import padded_groups, padded_tokens
from xl2jax.training.config import PRESETS as TRAINING
from xl2jax.training.config import TrainConfig, trained_names
from xl2jax.training.loss import IGNORE, TokenBatch
from xl2jax.training.sharding import batch_devices, batch_sharding, check_tensor, make_mesh
from xl2jax.training.state import Checkpoints, abstract_state, new_state, parameter_shapes
from xl2jax.training.step import MASTER, Metrics, Params, StepConfig, Steps, TrainState, learning_rate, optimizer
from xl2jax.training.telemetry import sample_flops


@dataclasses.dataclass(frozen=True)
class TrainBenchArgs:
    """Times optimizer steps of the whole model."""

    preset: str = "video-xl-2"
    """The sizes of the model, by name: video-xl-2 is the released one."""
    frames: int = 148
    """Frames of each sample; stage 4 takes at most 148."""
    rows: int = 1
    """Samples on each device in a step."""
    train: Literal["lora", "lora+projector", "all"] = "lora"
    """Which parameters are trained."""
    lora_rank: int = 64
    """Rank of the adapters."""
    weights: Weights | None = None
    """Has the frozen matrices of the LLM in 8 or 4 bits, not with --train all."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of activations."""
    fsdp: int | None = None
    """Devices over which parameters are split; by default all divided by --tensor."""
    tensor: int = 1
    """Devices over which each layer is split."""
    devices: int | None = None
    """Devices that take part; by default all."""
    steps: int = 5
    """Optimizer steps that are timed."""
    answer_tokens: int = 64
    """Tokens of each answer."""
    save: Path | None = None
    """Also saves the state in a new folder here, and resumes on half of the devices, or on the only one; the folder is
    removed, but not where the process is killed."""
    json: bool = False
    """Prints the rows as JSON."""

    def check(self) -> None:
        """Raises UserError for flags that are out of range."""
        if self.preset not in PRESETS:
            raise UserError(f"--preset: choose from {', '.join(PRESETS)}, not {self.preset!r}")
        if self.frames < FRAMES_PER_GROUP or self.rows < 1 or self.steps < 1:
            raise UserError(f"--frames must be {FRAMES_PER_GROUP} or more, --rows and --steps 1 or more")
        require_whole("--answer-tokens", self.answer_tokens, 1)
        if self.train != "all":
            require_whole("--lora-rank", self.lora_rank, 1)
        elif self.weights is not None:
            raise UserError("--weights has no use with --train all: quantised matrices cannot be trained themselves")
        if self.save is not None and not self.save.is_dir():
            raise UserError(f"--save {self.save}: no such folder")


class _Training:
    """A model with random weights in training on the first `devices` devices: `step` takes one optimizer step.

    rows: samples of a step, by default `args.rows` on each device that has a part of the batch.
    """

    def __init__(self, args: TrainBenchArgs, devices: int | None, rows: int | None = None):
        self.model = model = PRESETS[args.preset].with_weights(args.weights)
        config = dataclasses.replace(
            TRAINING["stage4"],
            checkpoint="random",
            data=Path(),
            output=Path(),
            fsdp=args.fsdp,
            tensor=args.tensor,
            compute_dtype=args.compute_dtype,
            lora_rank=0 if args.train == "all" else args.lora_rank,
            train=("projector.*",) if args.train == "lora+projector" else None,
        )
        self.mesh = mesh = make_mesh(config.fsdp, config.tensor, devices)
        step = StepConfig(model, config.lora, config.compute_dtype, remat=True)
        self.shapes = parameter_shapes(model, config.lora)
        self.trained = trained_names(config, list(self.shapes))
        self._tx, schedule = optimizer(config, self.trained, 1000), learning_rate(config, 1000)
        self.abstract = abstract_state({n: self.shapes[n] for n in self.trained}, self._tx, mesh)
        self.groups, self.rows = args.frames // FRAMES_PER_GROUP, rows or args.rows * batch_devices(mesh)
        batch = _batch(
            self.rows, self.groups, model.visual_tokens, model.vision.image_size, model.llm.vocab, args.answer_tokens
        )
        self._step = Steps(step, self._tx, schedule, self.abstract)
        names = set(self.trained)
        with jax.set_mesh(mesh):
            self._batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)
            self._frozen = _random(config, self.shapes, mesh, names, self.shapes.keys() - names)
        self._make_trained = lambda: _random(config, self.shapes, mesh, names, names)
        self.state: TrainState | None = None

    def start(self, state: TrainState | None = None) -> None:
        """Begins at `state`, or at step 0."""
        with jax.set_mesh(self.mesh):
            self.state = new_state(self._make_trained(), self._tx, self.abstract) if state is None else state

    def step(self) -> Metrics:
        assert self.state is not None
        with jax.set_mesh(self.mesh):
            self.state, metrics = self._step(self.state, self._frozen, iter([self._batch]), 1)
        return metrics

    def free(self) -> None:
        """Lets go of the parameters and of the state."""
        self.state, self._frozen = None, {}


def train_rows(args: TrainBenchArgs, rates: dict[str, float] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rates of the card, unless they are given, then the step: its median seconds after a first step that
    compiles; then, with `args.save`, how long the state takes to the disk and back.

    Raises:
      UserError: the devices cannot be divided in this way, or the model not over `tensor` of them.
    """
    check_tensor(PRESETS[args.preset], args.tensor)
    mesh = make_mesh(args.fsdp, args.tensor, args.devices)
    if args.save is not None:
        halved(*mesh.shape.values())
    if rates is None:
        rates = ceilings() if jax.default_backend() == "gpu" else {}
        yield rates
    training = _Training(args, args.devices)
    training.start()
    first, metrics = timed(training.step)
    losses = [float(metrics.loss)]
    seconds = []
    for _ in range(args.steps):
        took, metrics = timed(training.step)
        seconds.append(took)
        losses.append(float(metrics.loss))
    model, shapes, names = training.model, training.shapes, training.trained
    groups, rows = training.groups, training.rows
    median = statistics.median(seconds)
    tokens = _used_tokens(groups, model.visual_tokens, args.answer_tokens)  # without padding
    operations = rows * sample_flops(model, set(names), groups, tokens, args.answer_tokens)
    row: dict[str, Any] = {
        "train": args.train,
        "trained_parameters": int(sum(np.prod(shapes[n].shape) for n in names)),
        "mesh": "x".join(map(str, training.mesh.shape.values())),
        "frames": groups * FRAMES_PER_GROUP,
        "tokens": tokens,
        "rows": rows,
        "step_s": median,
        "tokens_per_s": rows * tokens / median,
        "tflops_per_device": operations / median / training.mesh.size / 1e12,
        "first_step_s": first,
        "peak_gib": memory.peak_bytes() / 2**30,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    if "matrix_tflops" in rates:
        row["share_of_card"] = row["tflops_per_device"] / rates["matrix_tflops"]
    yield row
    if args.save is not None:
        yield _saved(args, training, args.save)


def halved(data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """The axes of a mesh of half of the devices, over which a batch of the whole mesh can be split; one device stays.

    Raises UserError for other odd numbers of devices.
    """
    if data % 2 == 0:
        return data // 2, fsdp, tensor
    if fsdp % 2 == 0:
        return data, fsdp // 2, tensor
    if tensor % 2 and data * fsdp * tensor > 1:
        raise UserError(f"--save resumes on half of the devices, and {data * fsdp * tensor} is odd")
    return data, fsdp, max(tensor // 2, 1)


def _saved(args: TrainBenchArgs, training: _Training, parent: Path) -> dict[str, Any]:
    """Saves the state, and goes on with it on half of the devices. Frees `training`."""
    state, rows, devices = training.state, training.rows, training.mesh.size
    assert state is not None
    step, (data, fsdp, tensor) = int(state.step), halved(*training.mesh.shape.values())
    fewer = data * fsdp * tensor
    args = dataclasses.replace(args, fsdp=fsdp, tensor=tensor)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix="xl2jax-bench-") as folder,
        Checkpoints(Path(folder), keep=1) as checkpoints,
    ):
        started = time.perf_counter()
        checkpoints.save(state, {})
        checkpoints.wait()
        save_s = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        sums = [int(checksum(x)) for x in jax.tree.leaves(state)]
        loss = float(training.step().loss)
        training.free()
        resumed = _Training(args, fewer, rows)
        resume_s, state = timed(lambda: checkpoints.restore(resumed.abstract))
    same = sums == [int(checksum(x)) for x in jax.tree.leaves(state)]
    resumed.start(state)
    after = float(resumed.step().loss)
    return {
        "saved_step": step,
        "saved_gb": size / 1e9,
        "save_s": save_s,
        "devices": devices,
        "resumed_on": fewer,
        "resume_s": resume_s,
        "same_bits": same,
        "next_loss": loss,
        "next_loss_resumed": after,
    }


def _random(
    config: TrainConfig, shapes: dict[str, Any], mesh: Any, trained: set[str], wanted: Collection[str]
) -> Params:
    """The `wanted` parameters on the mesh, random: normal values scaled by fan-in, ones for norms, zeros for biases and for LoRA B."""
    out = {}
    for number, (name, s) in enumerate(shapes.items()):
        if name not in wanted:
            continue
        dtype = jnp.dtype(MASTER if name in trained else config.compute_dtype)
        dtype, shape = s.dtype if is_quantized(name) else dtype, s.shape

        def make(name: str = name, shape: Any = shape, dtype: Any = dtype, number: int = number) -> jax.Array:
            if name.endswith(("bias", "lora_b")):
                return jnp.zeros(shape, dtype)
            if jnp.issubdtype(dtype, jnp.integer):
                return jax.random.randint(jax.random.key(number), shape, 0, 100, dtype)
            if name.endswith("codes_scale"):
                return jnp.full(shape, 1e-4, dtype)
            if name.endswith("scale"):
                return jnp.ones(shape, dtype)
            width = 0.02 if name.endswith("embedding") else float(np.prod(shape[-2:-1])) ** -0.5
            return jax.random.normal(jax.random.key(number), shape, dtype) * jnp.asarray(width, dtype)

        out[name] = jax.jit(make, out_shardings=param_sharding(name, shape, mesh))()
    return out


def _used_tokens(groups: int, visual_tokens: int, answer: int) -> int:
    return PREFIX + groups * (TIMES + visual_tokens) + answer


def _batch(
    rows: int, groups: int, visual_tokens: int, size: int, vocab: int, answer: int
) -> tuple[np.ndarray, TokenBatch]:
    rng = np.random.default_rng(0)
    per_group, used = TIMES + visual_tokens, _used_tokens(groups, visual_tokens, answer)
    length = padded_tokens(used)
    ids = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    inside = np.arange(length) - PREFIX
    within = (inside >= 0) & (inside < groups * per_group) & (inside % per_group >= TIMES)
    place = np.where(within, inside // per_group * visual_tokens + inside % per_group - TIMES, -1)
    position = np.arange(length)
    counted = (position >= used - answer) & (position < used)
    labels = np.where(counted, ids, IGNORE).astype(np.int32)
    frames = padded_groups(groups) * FRAMES_PER_GROUP
    pixels = rng.integers(0, 256, (rows, frames, size, size, 3), np.uint8)
    columns = (ids, np.broadcast_to(place, ids.shape).astype(np.int32), labels)
    return pixels, TokenBatch(*map(jnp.asarray, columns))
