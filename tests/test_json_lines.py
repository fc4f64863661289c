"""Files of JSON lines that a killed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xl2jax.errors import UserError
from xl2jax.system.json_lines import finished_lines, resumed_rows


def test_rows_are_resumed(tmp_path: Path) -> None:
    path, settings = tmp_path / "rows.jsonl", {"seed": 1, "ages": [1, 2]}
    with resumed_rows(path, settings) as (rows, add):
        assert rows == []
        add({"n": 1})
        assert rows == [{"n": 1}]
        assert [json.loads(line) for line in path.read_text().splitlines()] == [settings, {"n": 1}]
    with open(path, "a") as f:
        f.write('{"n": 2')  # it was killed while it wrote
    with resumed_rows(path, settings) as (rows, add):
        add({"n": 3})
        assert rows == [{"n": 1}, {"n": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [settings, {"n": 1}, {"n": 3}]


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with resumed_rows(path, {}) as (_, add):
        with pytest.raises(UserError, match="another process is writing it"), resumed_rows(path, {}):
            pass
        add({"n": 1})
    with resumed_rows(path, {}) as (rows, _):
        assert rows == [{"n": 1}]


@pytest.mark.parametrize("text", ['{"seed": 2}\n{"n": 1', '{"one": "line"}', "words\n", "[1]\n"])
def test_other_files_are_left_as_they_are(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"other\.json: "), resumed_rows(path, {"seed": 1}):
        pass
    assert path.read_text() == text


@pytest.mark.parametrize("text", ['{"one": "line"}', "words", '{"n": 1}\nwords', '{"n": 1}\n{"n": 2}'])
def test_only_a_line_that_was_cut_is_removed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    for repair in (False, True):
        with pytest.raises(UserError, match="the end of line . is missing"):
            list(finished_lines(path, dict, repair=repair))
    assert path.read_text() == text
    path.write_text('{"n": 1}\n{"n": 2')
    assert list(finished_lines(path, dict, repair=True)) == [{"n": 1}]
    assert path.read_text() == '{"n": 1}\n'


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.jsonl", Path("/dev/null")):
        with pytest.raises(UserError, match=str(path)), resumed_rows(path, {}):
            pass
