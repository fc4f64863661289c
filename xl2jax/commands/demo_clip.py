"""`xl2jax demo-clip`: a small video for trying the bundled model, with questions and their right answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from xl2jax.errors import UserError
from xl2jax.evaluation.questions import Kind, Question, ask
from xl2jax.evaluation.scenes import Scene, make_scene, write_scene
from xl2jax.system.terminal import flag_errors, require_stdout

_GROUPS, _WIDTH, _HEIGHT = 32, 640, 360
_KINDS: tuple[Kind, ...] = ("colour_of", "time", "exists")


@dataclasses.dataclass(frozen=True)
class DemoClipArgs:
    """Writes a video of coloured shapes (two minutes, H.264). Prints questions about it, each with its right answer."""

    path: Annotated[Path, tyro.conf.Positional]
    """File to write (mp4)."""
    seed: int = 1
    """Each seed makes another video, which the bundled model was not trained on."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}")


def demo_questions(scene: Scene, seed: int) -> list[Question]:
    """One question of each kind that the scene allows."""
    rng = np.random.default_rng(seed)
    questions = []
    for kind in _KINDS:
        events = [scene.events[int(i)] for i in rng.permutation(len(scene.events))]
        candidates = (ask(scene, kind, scene.times(), rng, event=event) for event in events)
        questions.append(next((q for q in candidates if q is not None), None))
    return [q for q in questions if q is not None]


def main() -> None:
    with flag_errors():
        args = tyro.cli(DemoClipArgs, prog="xl2jax demo-clip")
    require_stdout()
    scene = make_scene(2 * args.seed + 1, _GROUPS)  # training scenes have even seeds
    write_scene(args.path, scene, width=_WIDTH, height=_HEIGHT)
    for question in demo_questions(scene, args.seed):
        print(f"{question.text}\t{question.answer}")
