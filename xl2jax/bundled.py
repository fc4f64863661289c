"""How the bundled checkpoint is made: python -m xl2jax.bundled build/demo

Vision first, through linear heads; then the LLM, with train.py's own loop, on videos of `xl2jax.synthetic`.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
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

from xl2jax.checkpoint import load_params, write_torch
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config
from xl2jax.demo import make_checkpoint
from xl2jax.model import abstract_model, normalise
from xl2jax.names import Entry, flatten
from xl2jax.read_ahead import resize
from xl2jax.synthetic import COLOURS, SHAPES, SIZES, DatasetArgs, Kind, make_scene, write_dataset
from xl2jax.terminal import run_command

_VISION_SEED = 100_000_000


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the bundled checkpoint's training: its videos and its optimizer settings."""

    name: str
    data: DatasetArgs
    learning_rate: float
    batch: int
    epochs: int = 1
    steps: int | None = None


_KINDS: tuple[Kind, ...] = ("colour", "shape", "time", "colour", "shape", "time", "exists", "first", "count")
_MORE_KINDS: tuple[Kind, ...] = (
    "colour_of", "shape_of", "colour_of", "shape_of", "exists", "first", "count", "colour", "shape", "time"
)  # fmt: skip
_SHORT = DatasetArgs(Path(), videos=6000, groups=(2, 3, 4, 6, 8), records=3, turns=6, seed=2, kinds=_KINDS)
VISION_STEPS = 900
STAGES = (
    Stage("short", _SHORT, 1e-3, 32, epochs=2),
    Stage("content", dataclasses.replace(_SHORT, records=2, kinds=_MORE_KINDS), 1e-3, 32, steps=240),
)


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Makes the bundled checkpoint: random weights, vision first, then the LLM on synthetic videos."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for data, runs and results; what is already there is not made again."""
    processes: int = 2
    """That write videos, and that read them."""


def labelled_groups(batch: int, size: int, first_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 frames [batch * 4, size, size, 3] of one group each, and the colour and form in it, the last class
    standing for none."""
    frames, colours, forms = [], [], []
    for i in range(batch):
        seed = 2 * (first_seed + i)
        empty = i % 8 == 0
        scene = make_scene(seed, 1, events=0 if empty else 1)
        width, height = SIZES[seed // 2 % len(SIZES)]
        frames += [resize(scene.frame(f, width, height), size) for f in range(FRAMES_PER_GROUP)]
        colours.append(len(COLOURS) if empty else list(COLOURS).index(scene.events[0].colour))
        forms.append(len(SHAPES) if empty else SHAPES.index(scene.events[0].shape))
    return np.stack(frames), np.array(colours), np.array(forms)


def pretrain_vision(source: Path, target: Path, *, steps: int, batch: int = 64, rate: float = 1e-3) -> None:
    """Vision tower, DTS and projector learn colours and forms through linear heads, which are thrown away.

    Stands for SigLIP's own pre-training: from random weights, the language loss alone learns colours at once and
    forms not at all in the steps that a CPU has time for.
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
        logits = jnp.split(model.encode_frames(normalise(frames)).mean(1) @ state[1], [int(classes[0])], axis=-1)
        losses, right = [], []
        for x, label in zip(logits, (colours, forms), strict=True):
            losses.append(optax.softmax_cross_entropy_with_integer_labels(x, label).mean())
            right.append((x.argmax(-1) == label).mean())
        return losses[0] + losses[1], jnp.stack(right)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, opt_state: Any, *examples: jax.Array) -> Any:
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state, *examples)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss, right

    opt_state = tx.init(state)
    make = functools.partial(labelled_groups, batch, config.vision.image_size)
    recent: deque[Any] = deque(maxlen=50)
    with multiprocessing.get_context("spawn").Pool(1) as pool, tqdm(total=steps, desc="vision", file=sys.stderr) as bar:
        ahead = deque(pool.apply_async(make, (_VISION_SEED + i * batch,)) for i in range(4))
        for i in range(4, steps + 4):
            ahead.append(pool.apply_async(make, (_VISION_SEED + i * batch,)))
            state, opt_state, loss, right = step(state, opt_state, *ahead.popleft().get())
            recent.append([float(loss), *map(float, right)])
            loss_mean, colour, form = np.mean(recent, axis=0)
            bar.set_postfix(loss=f"{loss_mean:.3f}", colour=f"{colour:.3f}", form=f"{form:.3f}")
            bar.update()
    learnt = {name: np.asarray(x) for name, x in flatten(nnx.State({**params, **state[0]})).items()}

    def read(entry: Entry) -> np.ndarray:
        return learnt[entry.param] if entry.layer is None else learnt[entry.param][entry.layer]

    write_torch(target, config, read, "float32", companions=source)


def train_bundled(args: TrainArgs) -> None:
    """Every stage starts from the one before it; the last one's weights are the bundled checkpoint."""
    from xl2jax.training.config import PRESETS as TRAINING
    from xl2jax.training.run import train

    random, weights = args.folder / "random", args.folder / "vision"
    if not random.exists():
        make_checkpoint(random, PRESETS["demo"], embedding=0.3, branch=0.4)
    if not weights.exists():
        pretrain_vision(random, weights, steps=VISION_STEPS)
    for stage in STAGES:
        data, result = args.folder / f"videos-{stage.data.seed}" / f"{stage.name}.json", args.folder / stage.name
        if not data.exists():
            write_dataset(
                dataclasses.replace(stage.data, folder=data.parent, conversations=data.name, processes=args.processes)
            )
        if not result.exists():
            status = train(
                dataclasses.replace(
                    TRAINING["stage4"], checkpoint=str(weights), data=data, export=result,
                    output=args.folder / f"run-{stage.name}", fps=1.0, max_fps=None, max_frames=4 * max(stage.data.groups),
                    learning_rate=stage.learning_rate, global_batch=stage.batch, micro_batch=stage.batch,
                    epochs=stage.epochs, max_steps=stage.steps, warmup=0.05, b2=0.98, weight_decay=0.05, remat=False,
                    save_every=100, compute_dtype="float32", export_dtype="float32", freeze=("vision.*", "dts.*"),
                    workers=args.processes if args.processes > 2 else 0, threads=1,
                )
            )  # fmt: skip
            if status:
                sys.exit(status)
        weights = result


if __name__ == "__main__":
    run_command(lambda: train_bundled(tyro.cli(TrainArgs, prog="python -m xl2jax.bundled")))
