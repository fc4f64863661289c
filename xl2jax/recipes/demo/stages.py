"""How the bundled checkpoint is made: python -m xl2jax.recipes.demo.stages build/demo

Vision first, through linear heads; then the LLM, with train.py's own loop, on videos of `xl2jax.recipes.demo.datasets`; then
looking up by time, on composed videos (`xl2jax.recipes.demo.composed`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

from xl2jax.checkpoint.params import load_params
from xl2jax.checkpoint.torch_folder import write_params
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import COLOURS, NEEDLE_KINDS, SHAPES, Kind, group_frames, make_scene
from xl2jax.models.video_xl2 import abstract_model, normalise
from xl2jax.recipes.demo.composed import Phase, encode_groups, train_composed
from xl2jax.recipes.demo.datasets import DatasetArgs, write_dataset
from xl2jax.recipes.demo.figures import plot_losses
from xl2jax.system.process_pool import in_processes
from xl2jax.system.terminal import run_command
from xl2jax.testing import make_checkpoint

_VISION_SEED = 100_000_000


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the bundled checkpoint's training: its videos and its optimizer settings."""

    name: str
    data: DatasetArgs
    learning_rate: float
    batch: int
    steps: int


# Finding by content and by time is what is hard: asked twice as often.
_KINDS: tuple[Kind, ...] = (*2 * NEEDLE_KINDS, "exists", "first", "count")
_DATA = DatasetArgs(Path(), records=2, turns=10, kinds=_KINDS)
VISION_STEPS = 1000
STAGES = (
    Stage("short", dataclasses.replace(_DATA, videos=16_000, groups=(2, 4, 8), seed=2), 1e-3, 128, steps=1600),
    Stage("long", dataclasses.replace(_DATA, videos=6_000, groups=(8, 32, 64), seed=3), 8e-4, 64, steps=1200),
    Stage("longest", dataclasses.replace(_DATA, videos=1_600, groups=(16, 64, 256), seed=4), 4e-4, 24, steps=350),
)

# Then looking up by time, on composed videos: short ones first, as the lookup is found there.
PHASES = (
    Phase("lookup-4", groups=4, batch=128, steps=2500, learning_rate=1e-3, seed=10),
    Phase("lookup-16", groups=16, batch=64, steps=4000, learning_rate=8e-4, seed=11),
    Phase("lookup-64", groups=64, batch=32, steps=2500, learning_rate=6e-4, seed=12),
    Phase("lookup-256", groups=256, batch=12, steps=1200, learning_rate=4e-4, seed=13),
)


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Makes the bundled checkpoint: random weights, vision first, then the LLM on synthetic and on composed videos."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for data, runs and results; what is already there is not made again."""
    processes: int = 2
    """That write videos, read them, and compose them."""


def labelled_groups(batch: int, size: int, grid: int, first_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 frames [batch * 4, size, size, 3] of one group each, and what its visual tokens should say.

    Returns the frames and, int32 [batch, grid * grid], the colour and the form of the shape whose centre lies at a
    token's place; the last class stands for none.
    """
    frames = []
    colours, forms = (np.full((batch, grid, grid), len(x), np.int32) for x in (COLOURS, SHAPES))
    for i in range(batch):
        seed = 2 * (first_seed + i)
        scene = make_scene(seed, 1, events=0 if i % 8 == 0 else 1)
        frames.append(group_frames(scene, size))
        for event in scene.events:
            half = (FRAMES_PER_GROUP - 1) / 2
            centre = (event.y + half * event.dy, event.x + half * event.dx)
            place = (i, *(min(int(c * grid), grid - 1) for c in centre))
            colours[place], forms[place] = list(COLOURS).index(event.colour), SHAPES.index(event.shape)
    return np.concatenate(frames), colours.reshape(batch, -1), forms.reshape(batch, -1)


def pretrain_vision(
    source: Path, target: Path, *, steps: int, processes: int = 1, batch: int = 64, rate: float = 1e-3
) -> None:
    """Every visual token learns to say which colour and form is at its place, through a linear head, thrown away.

    Stands for SigLIP's own pre-training: from random weights, the language loss alone learns colours at once and
    forms not at all. `processes` draw the frames.
    """
    config = VideoXL2Config.from_hf(source)
    _, params = load_params(source, "float32")
    graphdef = nnx.graphdef(abstract_model(config, "float32"))
    classes = np.cumsum([len(COLOURS) + 1, len(SHAPES) + 1])
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.standard_normal((config.llm.width, classes[-1])) * config.llm.width**-0.5, jnp.float32)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    parts = {name: params[name] for name in ("vision", "dts", "projector")}
    state = (parts, head)

    def loss_of(state: Any, frames: jax.Array, colours: jax.Array, forms: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, nnx.State({**params, **state[0]}))
        logits = jnp.split(model.encode_frames(normalise(frames)) @ state[1], [int(classes[0])], axis=-1)
        losses, right = [], []
        for x, label, none in zip(logits, (colours, forms), (len(COLOURS), len(SHAPES)), strict=True):
            loss = optax.softmax_cross_entropy_with_integer_labels(x, label)
            there = label != none  # so at few tokens: with and without a shape count alike
            losses += [jnp.mean(loss, where=there), jnp.mean(loss, where=~there)]
            right.append(jnp.mean(x.argmax(-1) == label, where=there))
        return jnp.sum(jnp.stack(losses)), jnp.stack(right)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, opt_state: Any, *examples: jax.Array) -> Any:
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state, *examples)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss, right

    opt_state = tx.init(state)
    make = functools.partial(labelled_groups, batch, config.vision.image_size, config.grid // 2)
    recent: deque[Any] = deque(maxlen=50)
    first_seeds = range(_VISION_SEED, _VISION_SEED + steps * batch, batch)
    with tqdm(total=steps, desc="vision", file=sys.stderr) as bar:
        for examples in in_processes(processes, make, first_seeds):
            state, opt_state, loss, right = step(state, opt_state, *examples)
            recent.append([float(loss), *map(float, right)])
            loss_mean, colour, form = np.mean(recent, axis=0)
            bar.set_postfix(loss=f"{loss_mean:.3f}", colour=f"{colour:.3f}", form=f"{form:.3f}")
            bar.update()
    write_params(target, config, nnx.State({**params, **state[0]}), companions=source)


def train_bundled(args: TrainArgs) -> None:
    """Every stage and phase starts from the one before it; the last one's weights are the bundled checkpoint.

    What has its result in the folder is not run again. loss.png has the curves of the LLM's that were.
    """
    from xl2jax.training.config import PRESETS as TRAINING
    from xl2jax.training.run import train

    random, weights = args.folder / "random", args.folder / "vision"
    if random.exists():
        found, wanted = VideoXL2Config.from_hf(random), PRESETS["demo"]
        if found != dataclasses.replace(wanted, llm=dataclasses.replace(wanted.llm, vocab=found.llm.vocab)):
            raise UserError(f"{args.folder}: holds a model of other sizes; choose another place or remove it first")
    if not random.exists():
        make_checkpoint(random, PRESETS["demo"], embedding=0.3, branch=0.4)
    if not weights.exists():
        pretrain_vision(random, weights, steps=VISION_STEPS, processes=args.processes)
    for stage in STAGES:
        data, result = args.folder / f"videos-{stage.name}" / "train.json", args.folder / stage.name
        if not result.exists():
            if not data.exists():
                write_dataset(dataclasses.replace(stage.data, folder=data.parent, processes=args.processes))
            status = train(
                dataclasses.replace(
                    TRAINING["stage4"], checkpoint=str(weights), data=data, export=result,
                    output=args.folder / f"run-{stage.name}", fps=1.0, max_fps=None, max_frames=4 * max(stage.data.groups),
                    max_length=16384, learning_rate=stage.learning_rate, global_batch=stage.batch,
                    micro_batch=stage.batch, epochs=-(-stage.steps * stage.batch // (stage.data.videos * stage.data.records)) + 1,
                    max_steps=stage.steps, warmup=0.05, b2=0.98, weight_decay=0.05, remat=max(stage.data.groups) > 64,
                    save_every=500, export_dtype="float32", freeze=("vision.*", "dts.*"),
                    workers=args.processes if args.processes > 2 else 0, threads=1,
                )
            )  # fmt: skip
            if status:
                sys.exit(status)
        weights = result
    encoded, heads = None, None
    for phase in PHASES:
        run, result = args.folder / f"run-{phase.name}", args.folder / phase.name
        if not result.exists():
            encoded = encode_groups(weights, processes=args.processes) if encoded is None else encoded
            train_composed(weights, result, phase, run, encoded=encoded, heads=heads, processes=args.processes)
        weights, heads = result, run
    curves = loss_curves(args.folder)
    if curves:
        plot_losses(args.folder / "loss.png", curves)


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, mean loss of the 25 up to it) of each stage and phase that ran in the folder."""
    curves = {}
    for name, log in (
        *((s.name, folder / f"run-{s.name}" / "metrics.jsonl") for s in STAGES),  # a line a step
        *((p.name, folder / f"run-{p.name}" / "log.jsonl") for p in PHASES),  # means already
    ):
        if log.exists():
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            size = 25 if log.name == "metrics.jsonl" else 1
            parts = itertools.batched(rows, size)
            curves[name] = [(part[-1]["step"], float(np.mean([row["loss"] for row in part]))) for part in parts]
    return curves


if __name__ == "__main__":
    run_command(lambda: train_bundled(tyro.cli(TrainArgs, prog="python -m xl2jax.recipes.demo.stages")))
