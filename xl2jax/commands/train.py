"""`xl2jax train` and train.py: a preset of flags, and flags that override it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from xl2jax.system.terminal import flag_errors
from xl2jax.training.config import PRESETS, Preset, TrainConfig
from xl2jax.training.run import train


def parse(argv: Sequence[str]) -> TrainConfig:
    """Parses flags. `--preset` sets the defaults, which the other flags override."""

    @dataclasses.dataclass
    class Chosen:
        preset: Annotated[Preset, tyro.conf.arg(name="preset")] = "stage4"

    with flag_errors():
        chosen, _ = tyro.cli(Chosen, args=[a for a in argv if a not in ("-h", "--help")], return_unknown_args=True)
        return tyro.cli(TrainConfig, prog="python train.py", args=list(argv), default=PRESETS[chosen.preset])


def main() -> int:
    """Trains and returns the exit status."""
    return train(parse(sys.argv[1:]))
