"""How well a model answers about single pictures of coloured shapes that training never showed.

python -m xl2jax.recipes.demo.picture_accuracy --checkpoint checkpoints/demo --cases 50
"""

from __future__ import annotations

import collections
import dataclasses
import sys

import numpy as np
import tyro
from tqdm import tqdm

import xl2jax
from xl2jax.errors import require_whole
from xl2jax.evaluation.questions import PICTURE_KINDS, Kind, ask_about_picture
from xl2jax.evaluation.scenes import PICTURE_SIZES, make_picture
from xl2jax.system.backend import start_backend
from xl2jax.system.terminal import flag_errors, run_command


@dataclasses.dataclass(frozen=True)
class AccuracyArgs:
    """Asks about pictures, and prints the share of right answers by kind of question and number of tiles."""

    checkpoint: str
    """Orbax folder, PyTorch folder or hub id."""
    cases: int = 50
    """Pictures of each size."""

    def __post_init__(self) -> None:
        require_whole("cases", self.cases, 1)


@dataclasses.dataclass(frozen=True)
class Row:
    """The answers to one kind of question about pictures of one number of tiles."""

    tiles: int
    kind: Kind
    asked: int
    right: int
    guess: float
    """The share of right answers that the most frequent answer alone would have."""


def accuracy(model: xl2jax.Model, cases: int, *, progress: bool = False) -> list[Row]:
    """Asks one question of each kind that a picture allows, about `cases` pictures of each of `PICTURE_SIZES`."""
    answers: dict[tuple[int, Kind], list[tuple[str, str]]] = collections.defaultdict(list)
    sizes = [size for size in PICTURE_SIZES for _ in range(cases)]
    for number, (width, height) in enumerate(tqdm(sizes, "ask", file=sys.stderr, disable=not progress)):
        scene, rng = make_picture(2 * number + 1), np.random.default_rng([number, 5])
        with model.see([scene.frame(0, width, height)]) as seen:
            tiles = seen.picture_tokens // model.config.tile_tokens
            for kind in PICTURE_KINDS:
                if (question := ask_about_picture(scene, kind, rng)) is not None:
                    got = model.ask(seen, question.text, max_new_tokens=8).text
                    answers[tiles, kind].append((question.answer, got))
    rows = []
    for (tiles, kind), pairs in sorted(answers.items()):
        (_, most), *_ = collections.Counter(expected for expected, _ in pairs).most_common(1)
        right = sum(expected == got for expected, got in pairs)
        rows.append(Row(tiles, kind, len(pairs), right, most / len(pairs)))
    return rows


def main() -> None:
    with flag_errors():
        args = tyro.cli(AccuracyArgs, prog="python -m xl2jax.recipes.demo.picture_accuracy")
    start_backend()
    rows = accuracy(xl2jax.load(args.checkpoint), args.cases, progress=True)
    for line in (
        ("tiles", "question", "asked", "right", "guessing"),
        *((str(r.tiles), r.kind, str(r.asked), f"{r.right / r.asked:.0%}", f"{r.guess:.0%}") for r in rows),
    ):
        print("  ".join(f"{cell:>10}" for cell in line))


if __name__ == "__main__":
    run_command(main)
