"""A training run from its configuration to its last checkpoint: mesh, data, steps, saves."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm.contrib.logging import logging_redirect_tqdm

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.prompt import PromptTokenizer
from xl2jax.sources import find_checkpoint
from xl2jax.training.batches import Length, MicroBatch, Probe, plan_epoch, probe_records
from xl2jax.training.config import TrainConfig, trained_names
from xl2jax.training.loader import Arrays, Loader, read_ahead
from xl2jax.training.loss import TokenBatch
from xl2jax.training.records import Record, read_records
from xl2jax.training.report import data_report, plan_report
from xl2jax.training.sharding import batch_devices, batch_sharding, check_tensor, make_mesh
from xl2jax.training.state import (
    Checkpoints,
    abstract_state,
    export,
    load_parameters,
    new_state,
    parameter_shapes,
    write_json,
)
from xl2jax.training.step import Metrics, Params, StepConfig, Steps, TrainState, learning_rate, optimizer
from xl2jax.training.telemetry import Telemetry, sample_flops

logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM stopped after it was saved."""

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
_FREE = {
    "output", "fsdp", "tensor", "coordinator", "processes", "process", "workers", "threads", "save_every", "keep",
    "export", "export_dtype", "tensorboard", "wandb", "dry_run", "validate_data", "preset", "micro_batch", "checkpoint", "data", "media_root",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is known before weights are read."""

    config: TrainConfig
    folder: Path
    step: StepConfig
    tokenizer: PromptTokenizer
    records: list[Record]
    mesh: Mesh
    shapes: dict[str, jax.ShapeDtypeStruct]
    trained: list[str]

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.config.micro_batch * batch_devices(self.mesh)

    @functools.cached_property
    def data_key(self) -> str:
        """Hash of all that the tokens and frames of the samples follow from."""
        records = [(str(r.media), r.kind, r.turns, r.scale) for r in self.records]
        return _digest(records, self.config.sampling(), self.config.max_length, self.tokenizer.tokenizer.to_str())


def train(config: TrainConfig) -> int:
    """The whole run; the command's exit status."""
    config.check()
    if config.coordinator is not None:
        # On CPUs programs that are in flight together would mix up their collectives.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    run = _prepare(config)
    if _is_main():
        print(plan_report(config, run.step, run.shapes, run.trained, run.mesh, len(run.records)))
    else:
        logging.getLogger("xl2jax").setLevel(logging.WARNING)
    if config.dry_run:
        return 0
    if config.validate_data:
        return _validate(run)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{config.output}: cannot be made ({e.strerror})") from None
    lengths = _lengths(run)
    pack_to = config.max_length if config.packing else None
    plan = [
        step
        for epoch in range(config.epochs)
        for step in plan_epoch(lengths, config.global_batch, run.rows, config.seed, epoch, pack_to=pack_to)
    ]
    with jax.set_mesh(run.mesh):
        return _steps(run, plan[: config.max_steps], lengths)


def _is_main() -> bool:
    return jax.process_index() == 0


def _prepare(config: TrainConfig) -> _Run:
    """Everything that can be refused before media or weights are read."""
    folder = find_checkpoint(config.checkpoint)
    model = VideoXL2Config.from_hf(folder)
    tokenizer = PromptTokenizer.load(folder, model.llm.vocab)
    mesh = make_mesh(config.fsdp, config.tensor)
    check_tensor(model, config.tensor)
    records = read_records(config.data, config.seed, config.media_root)
    images = sum(r.kind == "image" for r in records)
    if images and _is_main():
        logger.info("%d image samples: one view each; upstream's anyres tiles (unires) are not implemented", images)
    shapes = parameter_shapes(model, config.lora)
    step = StepConfig(model, config.lora, config.compute_dtype, config.remat)
    run = _Run(config, folder, step, tokenizer, records, mesh, shapes, trained_names(config, list(shapes)))
    if config.global_batch % run.rows:
        raise UserError(
            f"--global-batch {config.global_batch} is not a multiple of {run.rows} "
            f"(--micro-batch {config.micro_batch} on {batch_devices(mesh)} devices)"
        )
    if run.rows % jax.process_count():
        raise UserError(f"{run.rows} rows do not divide over {jax.process_count()} processes")
    return run


# --- data -------------------------------------------------------------------------------------


def _probe(run: _Run, decode_size: int | None = None) -> Probe:
    return probe_records(
        run.records, run.config.sampling(), run.tokenizer, run.step.model.visual_tokens, run.config.max_length,
        threads=run.config.threads, workers=run.config.workers, progress=_is_main(), decode_size=decode_size,
    )  # fmt: skip


def _validate(run: _Run) -> int:
    probe = _probe(run, run.step.model.vision.image_size)
    print(data_report(run.records, probe))
    return 1 if probe.problems else 0


def _lengths(run: _Run) -> Sequence[Length | None]:
    """Lengths of all records, kept in the output folder: a resumed run plans the same batches."""
    path = run.config.output / "lengths.json"
    found = None
    if _is_main():
        try:
            stored = json.loads(path.read_text())
            if stored["key"] == run.data_key:
                found = stored["lengths"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if found is None:
            probe = _probe(run)
            found = [None if x is None else [x.groups, x.tokens] for x in probe.lengths]
            for i, reason in probe.problems.items():
                logger.warning("skipped sample %s: %s", run.records[i].id, reason)
            if probe.problems:
                logger.warning("%d of %d samples are skipped", len(probe.problems), len(run.records))
            if probe.cut:
                logger.warning("%d samples are longer than %d tokens: cut", probe.cut, run.config.max_length)
            write_json(path, {"key": run.data_key, "lengths": found})
    if jax.process_count() > 1:  # all processes plan from the same lengths
        flat = np.zeros((len(run.records), 2), np.int32)
        if found is not None:
            flat[:] = [x or (-1, -1) for x in found]
        found = [None if g < 0 else [g, t] for g, t in multihost_utils.broadcast_one_to_all(flat).tolist()]
    assert found is not None
    if not any(found):
        raise UserError(f"{run.config.data}: not one sample can be used")
    return [None if x is None else Length(*x) for x in found]


def _digest(*values: Any) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


# --- steps ------------------------------------------------------------------------------------


def _identity(run: _Run, plan: list[list[MicroBatch]]) -> dict[str, str]:
    """What a checkpoint belongs to: settings that shape the result, and the samples of every step."""
    settings = {k: str(v) for k, v in dataclasses.asdict(run.config).items() if k not in _FREE}
    order = [[row for micro in step for row in micro.rows if row] for step in plan]
    return {**settings, "checkpoint": str(run.folder.resolve()), "data": run.data_key, "order": _digest(order)}


def _start(
    run: _Run,
    abstract: TrainState,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    identity: dict[str, str],
) -> tuple[TrainState, Params]:
    """The state to begin or go on with, and what is frozen."""
    trained = dict.fromkeys(run.trained, run.config.param_dtype)
    resumed = checkpoints.latest is not None
    if resumed:
        state, stored = checkpoints.restore(abstract)
        changed = sorted(k for k in identity if stored.get(k) != identity[k])
        if changed:
            what = ", ".join(f"{k} {stored.get(k)} -> {identity[k]}" for k in changed)
            raise UserError(f"{run.config.output}: holds a run with other settings ({what}); choose another --output")
        logger.info("resumed from step %d of %s", int(state.step), run.config.output)
        if len(trained) == len(run.shapes):
            return state, {}
    wanted = {n for n in run.shapes if not (resumed and n in trained)}
    loaded = load_parameters(run.folder, run.step, trained, run.mesh, run.config.seed, wanted, progress=_is_main())
    frozen = {n: p for n, p in loaded.items() if n not in trained}
    if not resumed:
        state = new_state({n: loaded[n] for n in run.trained}, tx, abstract)
    return state, frozen


class _Stop:
    """Set by SIGTERM."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        if jax.process_count() == 1:
            return self.asked
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.asked))))


@dataclasses.dataclass
class _Step:
    """A step that the device was given; its numbers are looked at when the next one was given too."""

    number: int
    metrics: Metrics
    read: list[Arrays]
    tokens: int
    operations: float


def _steps(run: _Run, plan: list[list[MicroBatch]], lengths: Sequence[Length | None]) -> int:
    config, model = run.config, run.step.model
    tx, schedule = optimizer(config, run.trained, len(plan)), learning_rate(config, len(plan))
    abstract = abstract_state({n: run.shapes[n] for n in run.trained}, tx, config.param_dtype, run.mesh)
    identity = _identity(run, plan)
    loader = Loader(
        run.records, config.sampling(), run.tokenizer, model.visual_tokens, config.max_length, model.vision.image_size
    )
    with (
        _Stop() as stop,
        Checkpoints(config.output, config.keep) as checkpoints,
        jax.default_matmul_precision("highest" if config.compute_dtype == "float32" else None),
        logging_redirect_tqdm(),
    ):
        state, frozen = _start(run, abstract, tx, checkpoints, identity)
        one_step = Steps(run.step, tx, schedule, abstract)
        first, trained = int(state.step), set(run.trained)
        arrays = read_ahead(
            [m for step in plan for m in step], loader, sum(map(len, plan[:first])), process=jax.process_index(),
            processes=jax.process_count(), workers=config.workers, threads=config.threads,
        )  # fmt: skip
        with Telemetry(
            config.output, len(plan), first, show=_is_main(), tensorboard=config.tensorboard, wandb=config.wandb,
            config=identity,
        ) as telemetry:  # fmt: skip
            pending: _Step | None = None
            for number, micro in enumerate(plan[first:], first + 1):
                used = [x for m in micro for row in m.rows for i in row if (x := lengths[i]) is not None]
                read: list[Arrays] = []
                state, metrics = one_step(state, frozen, _on_devices(arrays, read, run), len(micro))
                operations = sum(sample_flops(model, trained, x.groups, x.tokens) for x in used)
                given = _Step(number, metrics, read, sum(x.tokens for x in used), operations)
                if pending is not None:
                    _look_at(pending, telemetry, config.output)
                pending = given
                stopping = stop.agreed()
                if number % config.save_every == 0 or number == len(plan) or stopping:
                    _look_at(given, telemetry, config.output)
                    pending = None
                    checkpoints.save(state, identity)
                if stopping and number < len(plan):
                    logger.info("SIGTERM: saved step %d of %d", number, len(plan))
                    return TERMINATED
    if config.export is not None:
        export(config.export, run.step, state.params, config.export_dtype, run.folder)
        logger.info("wrote %s", config.export)
    return 0


def _look_at(step: _Step, telemetry: Telemetry, output: Path) -> None:
    """Waits for a step. Raises UserError where its loss is not a number: nothing is saved from then on."""
    for part in step.read:
        for failure in part["failed"]:
            telemetry.skipped += 1
            logger.warning("skipped sample %s (%d so far)", failure, telemetry.skipped)
    values = {k: float(v) for k, v in step.metrics._asdict().items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        samples = ", ".join(s for part in step.read for s in part["samples"])
        raise UserError(
            f"step {step.number}: loss {values['loss']}, gradient norm {values['grad_norm']}; samples {samples}; "
            f"the last checkpoint in {output} is as it was"
        )
    telemetry.step(step.number, values, step.tokens, step.operations)


def _on_devices(arrays: Iterator[Arrays], read: list[Arrays], run: _Run) -> Iterator[tuple[jax.Array, TokenBatch]]:
    """The next micro-batches on the mesh; `read` keeps what is known of them, without the frames."""
    sharding = batch_sharding(run.mesh)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array)

    for part in arrays:
        pixels = put(part["pixels"])
        read.append({**part, "pixels": part["pixels"][:0]})
        segment = put(part["segment"]) if run.config.packing else None
        yield pixels, TokenBatch(put(part["ids"]), put(part["visual"]), put(part["labels"]), segment)
