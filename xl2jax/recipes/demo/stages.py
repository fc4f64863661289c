"""The stages of training that make the bundled checkpoint, and their settings.

1. The vision tower, DTS and projector alone (`vision_training`).
2. The LLM, with the training loop of train.py, on data sets of short, long and longer videos (`datasets`).
3. The LLM again, on composed videos, to look up by time (`composed_rows`, `composed_training`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from xl2jax.arithmetic import ceil_div
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.evaluation.questions import NEEDLE_KINDS, Kind
from xl2jax.recipes.demo.composed_rows import Phase
from xl2jax.recipes.demo.composed_training import encode_groups, train_composed
from xl2jax.recipes.demo.datasets import DatasetArgs, write_dataset
from xl2jax.recipes.demo.figures import plot_losses
from xl2jax.recipes.demo.vision_training import train_vision
from xl2jax.testing import make_checkpoint


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the LLM's training with the loop of train.py: its data set and its optimizer settings."""

    name: str
    data: DatasetArgs
    learning_rate: float
    batch: int
    steps: int


# Questions about one shape are the difficult ones. They come twice as often as the others.
_KINDS: tuple[Kind, ...] = (*2 * NEEDLE_KINDS, "exists", "first", "count")
_DATA = DatasetArgs(Path(), records=2, turns=10, kinds=_KINDS)
VISION_STEPS = 1000
STAGES = (
    Stage("short", dataclasses.replace(_DATA, videos=16_000, groups=(2, 4, 8), seed=2), 1e-3, 128, steps=1600),
    Stage("long", dataclasses.replace(_DATA, videos=6_000, groups=(8, 32, 64), seed=3), 8e-4, 64, steps=1200),
    Stage("longest", dataclasses.replace(_DATA, videos=1_600, groups=(16, 64, 256), seed=4), 4e-4, 24, steps=350),
)
# The model learns to look up by time on short videos, so these come first.
PHASES = (
    Phase("lookup-4", groups=4, batch=128, steps=2500, learning_rate=1e-3, seed=10),
    Phase("lookup-16", groups=16, batch=64, steps=4000, learning_rate=8e-4, seed=11),
    Phase("lookup-64", groups=64, batch=32, steps=2500, learning_rate=6e-4, seed=12),
    Phase("lookup-256", groups=256, batch=12, steps=1200, learning_rate=4e-4, seed=13),
)


@dataclasses.dataclass(frozen=True)
class RecipeArgs:
    """Makes the bundled checkpoint from random weights, on synthetic videos alone."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for data, runs and results. Stages whose results it has already are not run again."""
    processes: int = 2
    """Processes that write videos, read them and compose rows."""


def run_recipe(args: RecipeArgs) -> None:
    """Runs every stage and phase, each from the weights of the one before. The last weights are the bundled checkpoint.

    Stages whose results are in the folder are not run again. loss.png shows the loss curves of the LLM.
    """
    folder, processes = args.folder, args.processes
    weights = _random_weights(folder / "random")
    vision = folder / "vision"
    if not vision.exists():
        train_vision(weights, vision, steps=VISION_STEPS, processes=processes)
    weights = vision
    for stage in STAGES:
        if not (folder / stage.name).exists():
            _train_stage(stage, weights, folder, processes)
        weights = folder / stage.name
    encoded, previous_run = None, None
    for phase in PHASES:
        run, result = folder / f"run-{phase.name}", folder / phase.name
        if not result.exists():
            encoded = encode_groups(weights, processes=processes) if encoded is None else encoded
            train_composed(weights, result, phase, run, encoded=encoded, previous_run=previous_run, processes=processes)
        weights, previous_run = result, run
    curves = loss_curves(folder)
    if curves:
        plot_losses(folder / "loss.png", curves)


def _random_weights(folder: Path) -> Path:
    """The checkpoint that training starts from; made if it does not exist."""
    demo = PRESETS["demo"]
    if not folder.exists():
        make_checkpoint(folder, demo, embedding_std=0.3, branch_scale=0.4)
    config = VideoXL2Config.from_hf(folder)
    if config != dataclasses.replace(demo, llm=dataclasses.replace(demo.llm, vocab=config.llm.vocab)):
        raise UserError(f"{folder}: holds a model of another size; choose another place or remove it first")
    return folder


def _train_stage(stage: Stage, weights: Path, folder: Path, processes: int) -> None:
    from xl2jax.training.config import PRESETS as TRAINING
    from xl2jax.training.run import train

    data = folder / f"videos-{stage.name}" / "train.json"
    if not data.exists():
        write_dataset(dataclasses.replace(stage.data, folder=data.parent, processes=processes))
    records = stage.data.videos * stage.data.records
    longest = max(stage.data.groups)
    config = dataclasses.replace(
        TRAINING["stage4"],
        checkpoint=str(weights),
        data=data,
        output=folder / f"run-{stage.name}",
        export=folder / stage.name,
        export_dtype="float32",
        freeze=("vision.*", "dts.*"),
        fps=1.0,
        max_fps=None,
        max_frames=FRAMES_PER_GROUP * longest,
        max_length=16384,
        learning_rate=stage.learning_rate,
        warmup=0.05,
        b2=0.98,
        weight_decay=0.05,
        global_batch=stage.batch,
        micro_batch=stage.batch,
        epochs=ceil_div(stage.steps * stage.batch, records) + 1,
        max_steps=stage.steps,
        save_every=500,
        remat=longest > 64,
        workers=processes if processes > 2 else 0,
        threads=1,
    )
    status = train(config)
    if status:
        sys.exit(status)


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, mean loss of the 25 steps up to it) of each stage and phase that ran in the folder."""
    curves = {}
    for name, log in (
        *((s.name, folder / f"run-{s.name}" / "metrics.jsonl") for s in STAGES),  # a line for each step
        *((p.name, folder / f"run-{p.name}" / "log.jsonl") for p in PHASES),  # a line for 25 steps
    ):
        if log.exists():
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            parts = itertools.batched(rows, 25 if log.name == "metrics.jsonl" else 1)
            curves[name] = [(part[-1]["step"], float(np.mean([row["loss"] for row in part]))) for part in parts]
    return curves
