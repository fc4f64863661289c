from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_json, outcome

from xl2jax.errors import UserError
from xl2jax.inference.selection_files import Selection, read_selection


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    config = {"selected_topk": 2, "selected_chunk_size": 2, "compression": 4, "relevance oracle": "LanguageBind"}
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({
        "plotQA": None,
        "needle": {"config": config, "selected_unit_indices": {"clip.mp4_Where is it?": [3, 0, 7]}},
        "count": {"config": config | {"selected_topk": 8}, "selected_unit_indices": {"lv_How many?": [1]}},
    }))  # fmt: skip
    return path


def test_selection_file(selection: Path) -> None:
    best_two_of_three = Selection([3, 0], 2, 4)
    assert read_selection(selection, "clip.mp4", "Where is it?", None) == best_two_of_three
    assert read_selection(selection, "lv.mp4", "How many?", "count") == Selection([1], 2, 4)
    assert read_selection(selection, "clip.mp4", "Where?", None) is None
    assert read_selection(selection, "clip.mp4", "Where is it?", "plotQA") is None
    with pytest.raises(UserError, match="no category 'other'"):
        read_selection(selection, "clip.mp4", "Where is it?", "other")


CONFIG = {"selected_topk": 2, "selected_chunk_size": 2, "compression": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "should be an object"),
        ({"a": 1}, "a: should be an object"),
        ({"a": {"selected_unit_indices": {}}}, "a.config: is missing"),
        ({"a": {"config": CONFIG}}, "a.selected_unit_indices: is missing"),
        ({"a": {"config": CONFIG, "selected_unit_indices": {"q": None}}}, "selected_unit_indices.q: should be"),
        ({"a": {"config": CONFIG, "selected_unit_indices": {"q": ["1"]}}}, "selected_unit_indices.q.0: should be"),
        ({"a": {"config": CONFIG, "selected_unit_indices": {"q": [-1]}}}, "greater than or equal to 0, not -1"),
        ({"a": {"config": CONFIG | {"compression": 0}, "selected_unit_indices": {}}}, "a.config.compression"),
        ({"a": {"config": CONFIG | {"selected_topk": 2**70}, "selected_unit_indices": {}}}, "not a very large number"),
        ({"a": {"config": CONFIG | {"selected_topk": float("nan")}, "selected_unit_indices": {}}}, "not JSON"),
        ({"n" * 5000: 1}, "nnn"),
    ],
)
def test_broken_selection_files(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as e:
        read_selection(path, "clip.mp4", "Where is it?", None)
    assert len(str(e.value)) < 300


def test_selection_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.json: no such file"):
        read_selection(tmp_path / "none.json", "a", "b", None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_selection(tmp_path / "pipe", "a", "b", None)
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        read_selection(tmp_path / "deep", "a", "b", None)


def test_fuzzed_selection_files(selection: Path) -> None:
    text = selection.read_bytes()
    for seed in range(300):
        selection.write_bytes(damaged_json(text, random.Random(seed)))
        chosen, _ = outcome(lambda: read_selection(selection, "clip.mp4", "Where is it?", None))
        if chosen is not None:
            assert all(unit >= 0 for unit in chosen.units)
            assert chosen.select_chunk_groups >= 1
            assert chosen.pool >= 1
