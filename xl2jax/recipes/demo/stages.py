"""The stages of training that make the bundled checkpoint, and their settings.

1. The vision tower, DTS and projector alone (`vision_training`).
2. The LLM, on composed videos that become longer (`composed_rows`, `composed_training`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.recipes.demo.composed_rows import Phase
from xl2jax.recipes.demo.composed_training import encode_groups, train_composed
from xl2jax.recipes.demo.figures import plot_losses
from xl2jax.recipes.demo.vision_training import train_vision
from xl2jax.testing import make_checkpoint
from xl2jax.training.processes import locked

VISION_STEPS = 1000
# The model learns to look up by time on short videos, so these come first.
PHASES = (
    Phase("lookup-4", groups=4, batch=128, steps=5000, learning_rate=1e-3, seed=10),
    Phase("lookup-16", groups=16, batch=64, steps=6000, learning_rate=8e-4, seed=11),
    Phase("lookup-64", groups=64, batch=32, steps=4500, learning_rate=6e-4, seed=12),
    Phase("lookup-256", groups=256, batch=12, steps=2200, learning_rate=4e-4, seed=13),
)


@dataclasses.dataclass(frozen=True)
class RecipeArgs:
    """Makes the bundled checkpoint from random weights, on synthetic videos alone."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for runs and results. Phases whose results it has already are not run again."""
    processes: int = 2
    """Processes that draw frames and compose rows."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"--processes must be 1 or more, not {self.processes}")


def run_recipe(args: RecipeArgs) -> None:
    """Trains the vision tower and runs every phase, each from the weights of the one before. The last weights are the
    bundled checkpoint.

    Phases whose results are in the folder are not run again. loss.png shows the loss curves of the LLM.

    Raises UserError where another run uses the folder, or where it cannot be written.
    """
    with locked(args.folder):
        _run_recipe(args.folder, args.processes)


def _run_recipe(folder: Path, processes: int) -> None:
    weights = _random_weights(folder / "random")
    vision = folder / "vision"
    if not vision.exists():
        train_vision(weights, vision, steps=VISION_STEPS, processes=processes)
    weights = vision
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


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, mean loss of the 25 steps up to it) of each phase that ran in the folder."""
    curves = {}
    for phase in PHASES:
        log = folder / f"run-{phase.name}" / "log.jsonl"
        if log.exists():
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            curves[phase.name] = [(row["step"], row["loss"]) for row in rows]
    return curves
