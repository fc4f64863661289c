"""The tool that tells what in a long video is hard for a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.evaluation.questions import TEMPLATES


@pytest.fixture(scope="module")
def long_rows(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("long_rows")


def test_kinds_are_told_by_their_templates(long_rows: ModuleType) -> None:
    words = {"colour": "red", "shape": "star", "name": "red star", "time": "8.0"}
    for kind, texts in TEMPLATES.items():
        for text in texts:
            assert long_rows.kind_of(re.sub(r"{(\w+)}", lambda m: words.get(m[1], "blue cross"), text)) == kind


def test_refusals(tmp_path: Path, long_rows: ModuleType, refused: Callable[..., str]) -> None:
    """All checkpoints are examined before one is loaded."""
    assert "give one or more checkpoints" in refused(long_rows.main)
    assert "--rows must be 1 or more" in refused(long_rows.main, DEFAULT_CHECKPOINT, "--rows", 0)
    assert "no such checkpoint" in refused(long_rows.main, DEFAULT_CHECKPOINT, tmp_path / "none")
    assert "config.json: no such file" in refused(long_rows.main, DEFAULT_CHECKPOINT, tmp_path)
    assert "--bogus" in refused(long_rows.main, "--bogus")


@pytest.mark.slow
def test_the_bundled_model_answers_long_rows(
    long_rows: ModuleType, command: Callable[..., tuple[int, str, str]]
) -> None:
    """A row of each kind: by time nearly all of its answers are right."""
    status, out, err = command(long_rows.main, DEFAULT_CHECKPOINT, "--rows", 2)
    assert status == 0, err
    head, *table = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert [(row[1], row[2]) for row in table] == [
        (length, times) for length in ("short", "10,000 frames or more") for times in ("below 4,096 s", "five digits")
    ]
    for row in table:
        share, count = re.fullmatch(r"(\d+)% of (\d+)", row[head.index("by_time")]).groups()  # type: ignore[union-attr]
        assert int(count) >= 3
        assert int(share) >= 80
