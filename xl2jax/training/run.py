"""Runs training from its configuration to the last checkpoint: mesh, data, steps and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm.contrib.logging import logging_redirect_tqdm

from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.errors import UserError
from xl2jax.prompt import PromptTokenizer
from xl2jax.system.backend import start_backend
from xl2jax.training.batches import MicroBatch, Probe, plan_epoch, probe_records
from xl2jax.training.config import TrainConfig, trained_names
from xl2jax.training.fingerprint import digest
from xl2jax.training.identity import ORDER, SAMPLES, order_digest, refuse_other_settings, settings_of
from xl2jax.training.lengths import Sample, differences, measure, read_lengths, samples_digest, write_lengths
from xl2jax.training.loader import Arrays, Loader, read_ahead
from xl2jax.training.loss import TokenBatch
from xl2jax.training.processes import from_main, is_main, locked
from xl2jax.training.records import Record, RecordSet, read_records
from xl2jax.training.report import data_report, plan_report
from xl2jax.training.sharding import batch_devices, batch_sharding, check_tensor, make_mesh
from xl2jax.training.signals import Signals
from xl2jax.training.state import Checkpoints, abstract_state, export, load_parameters, new_state, parameter_shapes
from xl2jax.training.step import Batch, Metrics, Params, StepConfig, Steps, TrainState, learning_rate, optimizer
from xl2jax.training.telemetry import Telemetry, sample_flops

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything that is known before weights and media are read."""

    config: TrainConfig
    folder: Path
    step: StepConfig
    tokenizer: PromptTokenizer
    data: RecordSet
    mesh: Mesh
    shapes: dict[str, jax.ShapeDtypeStruct]
    trained: list[str]

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.config.micro_batch * batch_devices(self.mesh)


def train(config: TrainConfig) -> int:
    """Runs training. Returns the exit status of the command."""
    config.check()
    if config.coordinator is not None:
        # On CPUs, collectives of programs that run at the same time would be mixed up.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    # Cached CPU programs order their collectives differently from new ones, so several processes would deadlock.
    start_backend(keep_programs=config.compile_cache and config.coordinator is None)
    run = _prepare(config)
    if is_main():
        print(plan_report(config, run.step, run.shapes, run.trained, run.mesh, run.data))
    else:
        logging.getLogger("xl2jax").setLevel(logging.WARNING)
    if config.dry_run:
        return 0
    if config.validate_data:
        return _validate(run)
    with contextlib.ExitStack() as stack, jax.set_mesh(run.mesh):
        from_main(lambda: stack.enter_context(locked(config.output)))
        return _train(run)


def _prepare(config: TrainConfig) -> _Run:
    """Checks everything that can be checked before media or weights are read."""
    folder = find_checkpoint(config.checkpoint)
    model = stored_config(folder, config.weights)
    if model.llm.weights is not None and not config.lora_rank:
        raise UserError(
            f"{folder}: its weights are {model.llm.weights}, which cannot be trained themselves: add --lora-rank, or start "
            "from a checkpoint in 16 or 32 bits"
        )
    tokenizer = PromptTokenizer.load(folder, model.llm.vocab)
    mesh = make_mesh(config.fsdp, config.tensor)
    check_tensor(model, config.tensor)
    data = read_records(config.data, config.seed, config.media_root)
    if config.strict:
        _refuse_skipping(data.malformed)
    if any(r.pictures for r in data.records):
        model.grids()
    if data.cut and is_main():
        logger.warning(
            "%d image samples have text before or between <image>: as upstream's trainer does, their pictures move to the "
            "front of the turn, and its first characters are cut",
            data.cut,
        )
    shapes = parameter_shapes(model, config.lora)
    step = StepConfig(model, config.lora, config.compute_dtype, config.remat)
    run = _Run(config, folder, step, tokenizer, data, mesh, shapes, trained_names(config, list(shapes)))
    if config.global_batch % run.rows:
        raise UserError(
            f"--global-batch {config.global_batch} is not a multiple of {run.rows} "
            f"(--micro-batch {config.micro_batch} on {batch_devices(mesh)} devices)"
        )
    if run.rows % jax.process_count():
        raise UserError(f"{run.rows} rows do not divide over {jax.process_count()} processes")
    return run


def _train(run: _Run) -> int:
    """Resumes what the output folder holds, measures the data, trains and exports."""
    config = run.config
    identity = settings_of(config, run.step.model, run.tokenizer, run.folder)
    with Checkpoints(config.output, config.keep) as checkpoints:
        before = checkpoints.identity()
        if before is not None:
            refuse_other_settings(config.output, before, identity)
        samples = from_main(lambda: _samples(run, before))
        pack_to = config.max_length if config.packing else None
        lengths = [x.length for x in samples]
        plan = [
            step
            for epoch in range(config.epochs)
            for step in plan_epoch(lengths, config.global_batch, run.rows, config.seed, epoch, pack_to=pack_to)
        ][: config.max_steps]
        identity |= {SAMPLES: samples_digest(samples), ORDER: order_digest(plan)}
        if before is not None:
            refuse_other_settings(config.output, before, identity)
        signals = Signals()
        state = _steps(run, plan, samples, checkpoints, identity, signals)
    if state is None:
        return signals.status
    if config.export is not None:
        export(config.export, run.step, state.params, config.export_dtype, run.folder)
        logger.info("wrote %s", config.export)
    return 0


# --- data -------------------------------------------------------------------------------------


def _probe(run: _Run, records: list[Record], *, decode: bool = False) -> Probe:
    return probe_records(
        records,
        run.config.sampling(),
        run.tokenizer,
        run.step.model,
        run.config.max_length,
        threads=run.config.threads,
        workers=run.config.workers,
        progress=is_main(),
        decode=decode,
    )


def _validate(run: _Run) -> int:
    probe = _probe(run, run.data.records, decode=True)
    print(data_report(run.data.records, run.data.malformed, probe))
    return 1 if probe.problems or run.data.malformed else 0


def _refuse_skipping(skipped: Sequence[str]) -> None:
    if skipped:
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise UserError(f"--strict: {len(skipped)} samples cannot be used: {'; '.join(skipped[:3])}{more}")


def _samples(run: _Run, before: dict[str, str] | None) -> list[Sample]:
    """All usable samples. Skipped ones are logged. `before` is the identity of the run that resumes, or None.

    Raises:
      UserError: no sample can be used, --strict forbids skipping, or the samples of a run that resumes have changed.
    """
    config, data = run.config, run.data
    model = run.step.model
    tiles = (model.vision.image_size, model.tile_tokens, model.picture_grids)
    settings = digest(
        config.sampling(), config.max_length, model.visual_tokens, tiles, run.tokenizer.tokenizer.to_str()
    )
    stored = read_lengths(config.output)
    measured = measure(data.records, settings, stored, functools.partial(_probe, run), config.threads)
    skipped = [*(f"malformed: {x}" for x in data.malformed), *measured.problems]
    if config.strict:
        _refuse_skipping(skipped)
    for line in skipped:
        logger.warning("skipped %s", line)
    if skipped:
        logger.warning(
            "%d of %d samples are skipped: %d are malformed, %d cannot be read",
            len(skipped),
            len(data.malformed) + len(data.records),
            len(data.malformed),
            len(measured.problems),
        )
    if measured.cut:
        logger.warning("%d samples are longer than %d tokens and are cut", measured.cut, config.max_length)
    if not measured.samples:
        raise UserError(f"{config.data}: no sample can be used")
    if before is not None and before.get(SAMPLES) != samples_digest(measured.samples):
        raise UserError(
            f"{config.output}: the samples have changed since this run began: "
            f"{differences(stored, measured.stored)}; restore them or choose another --output"
        )
    if measured.stored != stored:
        write_lengths(config.output, measured.stored)
    return measured.samples


# --- steps ------------------------------------------------------------------------------------


def _start(
    run: _Run, abstract: TrainState, tx: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[TrainState, Params]:
    """The initial or the restored state, and the frozen parameters."""
    trained = set(run.trained)
    resumed = checkpoints.latest is not None
    if resumed:
        state = checkpoints.restore(abstract)
        logger.info("resumed from step %d of %s", int(state.step), run.config.output)
        if len(trained) == len(run.shapes):
            return state, {}
    wanted = {n for n in run.shapes if not (resumed and n in trained)}
    loaded = load_parameters(run.folder, run.step, trained, run.mesh, run.config.seed, wanted, progress=is_main())
    frozen = {n: p for n, p in loaded.items() if n not in trained}
    if not resumed:
        state = new_state({n: loaded[n] for n in run.trained}, tx, abstract)
    return state, frozen


@dataclasses.dataclass
class _Step:
    """A step that was dispatched. Metrics lag one step: they are read when the next step has been dispatched."""

    number: int
    metrics: Metrics
    read: list[Arrays]
    tokens: int
    operations: float
    """Of all samples, but for the logits."""
    label_operations: float
    """Of the logits of one labelled token."""


def _steps(
    run: _Run,
    plan: list[list[MicroBatch]],
    samples: Sequence[Sample],
    checkpoints: Checkpoints,
    identity: dict[str, str],
    signals: Signals,
) -> TrainState | None:
    """Trains the remaining steps of the plan. Returns the last state, or None if a signal stopped the run."""
    config, model = run.config, run.step.model
    tx, schedule = optimizer(config, run.trained, len(plan)), learning_rate(config, len(plan))
    abstract = abstract_state({n: run.shapes[n] for n in run.trained}, tx, run.mesh)
    loader = Loader(
        [x.record for x in samples],
        config.sampling(),
        run.tokenizer,
        model,
        config.max_length,
    )
    with (
        jax.default_matmul_precision("highest" if config.compute_dtype == "float32" else None),
        logging_redirect_tqdm(),
    ):
        state, frozen = _start(run, abstract, tx, checkpoints)
        one_step = Steps(run.step, tx, schedule, abstract)
        first, trained = int(state.step), set(run.trained)
        reading = read_ahead(
            [m for step in plan for m in step],
            loader,
            sum(map(len, plan[:first])),
            process=jax.process_index(),
            processes=jax.process_count(),
            workers=config.workers,
            threads=config.threads,
        )
        with (
            signals,
            contextlib.closing(reading) as arrays,
            Telemetry(
                config.output,
                len(plan),
                first,
                show=is_main(),
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=identity,
            ) as telemetry,
        ):
            pending: _Step | None = None
            for number, micro in enumerate(plan[first:], first + 1):
                used = [samples[i].length for m in micro for row in m.rows for i in row]
                read: list[Arrays] = []
                state, metrics = one_step(state, frozen, _on_devices(arrays, read, run), len(micro))
                operations = sum(sample_flops(model, trained, x.groups, x.tokens, 0, x.tiles) for x in used)
                of_label = sample_flops(model, trained, 0, 0, 1)
                dispatched = _Step(number, metrics, read, sum(x.tokens for x in used), operations, of_label)
                if pending is not None:
                    _record(pending, telemetry, config)
                pending = dispatched
                stopping = signals.stop_after(number)
                if number % config.save_every == 0 or number == len(plan) or stopping:
                    _record(dispatched, telemetry, config)
                    pending = None
                    checkpoints.save(state, identity)
                if stopping:
                    checkpoints.wait()
                    break
    if int(state.step) < len(plan):
        logger.info("%s: saved step %d of %d", signals.name, int(state.step), len(plan))
        return None
    return state


def _record(step: _Step, telemetry: Telemetry, config: TrainConfig) -> None:
    """Waits for a step and logs its metrics.

    Raises:
      UserError: the loss or the gradient norm is not finite, or --strict forbids that a sample was skipped. The step is
        not saved.
    """
    failed = [failure for part in step.read for failure in part["failed"]]
    if config.strict:
        _refuse_skipping([f"sample {failure}" for failure in failed])
    for failure in failed:
        telemetry.skipped += 1
        logger.warning("skipped sample %s (%d so far)", failure, telemetry.skipped)
    values = {k: float(v) for k, v in step.metrics._asdict().items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        samples = ", ".join(s for part in step.read for s in part["samples"])
        raise UserError(
            f"step {step.number}: loss {values['loss']}, gradient norm {values['grad_norm']}; samples {samples}; "
            f"the last checkpoint in {config.output} is unchanged"
        )
    operations = step.operations + step.label_operations * values["labelled_tokens"]
    telemetry.step(step.number, values, step.tokens, operations)


def _on_devices(arrays: Iterator[Arrays], read: list[Arrays], run: _Run) -> Iterator[Batch]:
    """Yields micro-batches on the mesh. Appends each one, without its frames and tiles, to `read`."""
    sharding = batch_sharding(run.mesh)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array)

    for part in arrays:
        pixels, tiles = put(part["pixels"]), put(part["tiles"])
        read.append({**part, "pixels": part["pixels"][:0], "tiles": part["tiles"][:0]})
        lengths = put(part["lengths"]) if run.config.packing else None
        yield pixels, TokenBatch(put(part["ids"]), put(part["visual"]), put(part["labels"]), lengths), tiles
