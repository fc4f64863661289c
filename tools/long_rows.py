"""Which part of a long video is hard for a checkpoint: its distances and noise, or its times?

python tools/long_rows.py checkpoints/demo [OTHER ...]

Answers about rows of the recipe (`xl2jax.recipes.demo.composed_rows`) that no training saw: short videos and such that
represent at least 10,000 frames, each with times below 4,096 s and with times of five digits. Prints the share of answers
whose tokens are all the most likely ones, by kind of question.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from xl2jax.checkpoint.params import load_params, stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.errors import UserError
from xl2jax.evaluation.needle import FAMILIES
from xl2jax.evaluation.questions import TEMPLATES, Kind
from xl2jax.models.video_xl2 import VideoXL2, abstract_model
from xl2jax.prompt import IM_END, IM_START, PromptTokenizer
from xl2jax.recipes.demo.composed_rows import Phase, Rows, compose
from xl2jax.recipes.demo.composed_training import encode_groups, language_loss
from xl2jax.system.backend import start_backend
from xl2jax.system.tables import print_table
from xl2jax.system.terminal import flag_errors, run_command

BATCH, FIRST_SEED = 4, 910_000_000
PHASE = Phase("long rows", groups=64, batch=BATCH, steps=1, learning_rate=0.0, seed=0)
_TEMPLATES = {
    kind: [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(text))) for text in texts]
    for kind, texts in TEMPLATES.items()
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Accuracy about short and long rows, with times of few and of many digits."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Checkpoint folders or hub ids."""
    rows: int = 16
    """Rows of each of the four kinds, with several questions each."""


def kind_of(question: str) -> Kind:
    """The kind of question whose template this is."""
    return next(kind for kind, texts in _TEMPLATES.items() if any(t.fullmatch(question) for t in texts))


def answers(row: Rows[np.ndarray], tokenizer: PromptTokenizer) -> Iterator[tuple[Kind, slice]]:
    """The kind of each question of a row, and the places of its answer."""
    (opening,), (closing,), (assistant,) = map(tokenizer.encode, (IM_START, IM_END, "assistant"))
    end = int(np.flatnonzero(row.visual >= 0)[-1]) + 1
    for first in (np.flatnonzero((row.ids[:-1] == opening) & (row.ids[1:] == assistant)) + 3).tolist():
        closes = np.flatnonzero(row.ids[first:] == closing)
        if not len(closes):  # the row was cut
            return
        question = re.split("user\n|^\n", tokenizer.decode(row.ids[end : first - 3].tolist()))[-1]
        yield kind_of(question.strip()), slice(first, first + int(closes[0]))
        end = first + int(closes[0])


def rows_of(
    tokenizer: PromptTokenizer, visual_tokens: int, count: int, *, long: bool, late: bool
) -> list[Rows[np.ndarray]]:
    """`count` rows without blind questions."""
    found: list[Rows[np.ndarray]] = []
    for i in itertools.count():
        row = compose(FIRST_SEED + i, PHASE, tokenizer, visual_tokens, 2)
        times = [float(t) for t in re.findall(r"Time ([\d.]+)s:", tokenizer.decode(row.ids.tolist()))]
        groups = row.positions[-1] / (12 + visual_tokens)
        if row.blind.any() or len(times) < 8 or not (groups >= 2500 if long else groups < 100):
            continue
        if min(times) > 10_000 if late else max(times) < 4096:
            found.append(row)
        if len(found) == count:
            return found
    raise AssertionError


def main() -> None:
    with flag_errors():
        args = tyro.cli(Args, prog="python tools/long_rows.py")
    if not args.checkpoints:
        raise UserError("give one or more checkpoints")
    if args.rows < 1:
        raise UserError(f"--rows must be 1 or more, not {args.rows}")
    folders = {name: find_checkpoint(name) for name in args.checkpoints}
    for folder in folders.values():
        stored_config(folder)
    start_backend()
    table = []
    for name, folder in folders.items():
        config, params = load_params(folder, "float32")
        model: VideoXL2 = nnx.merge(nnx.graphdef(abstract_model(config, "float32")), params)
        tokenizer = PromptTokenizer.load(folder, config.llm.vocab)
        encoded = jnp.asarray(encode_groups(folder, groups_per_class=2, processes=1))

        @jax.jit
        def predicted(batch: Rows[jax.Array], model: VideoXL2 = model, encoded: jax.Array = encoded) -> jax.Array:
            _, layers = language_loss(model, encoded, batch)
            return model.llm.logits(model.llm.norm(layers[-1])).argmax(-1)

        for long, late in itertools.product((False, True), repeat=2):
            right = defaultdict(list)
            rows = rows_of(tokenizer, config.visual_tokens, args.rows, long=long, late=late)
            for part in itertools.batched(rows, BATCH):
                tokens = np.asarray(predicted(Rows(*(jnp.asarray(np.stack(x)) for x in zip(*part, strict=True)))))
                for row, said in zip(part, tokens, strict=True):
                    for kind, place in answers(row, tokenizer):
                        family = next((f for f, kinds in FAMILIES.items() if kind in kinds and f != "whole"), kind)
                        right[family].append((said[place.start - 1 : place.stop - 1] == row.ids[place]).all())
            table.append(
                {"checkpoint": name, "video": "10,000 frames or more" if long else "short", "times": "five digits" if late else "below 4,096 s"}
                | {key: f"{np.mean(x):.0%} of {len(x)}" for key, x in sorted(right.items())}
            )  # fmt: skip
    print_table(table, decimals=2)


if __name__ == "__main__":
    run_command(main)
