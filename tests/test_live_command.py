"""`infer --live`: answers at intervals, at the end and from stdin; bad flags."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xl2jax.commands import infer

FAST = ("--live", "--fps", 2, "--max-new-tokens", 2, "--dense-minutes", 0.1, "--minutes", 0.5)


@pytest.mark.slow
def test_answers_at_intervals_cover_the_video(ask: Callable[..., Any], tmp_path: Path) -> None:
    disk = ("--host-gib", 0, "--disk-gib", 1, "--disk-folder", tmp_path)
    status, out, err = ask("--question", "What?", "--ask-every", 9, "--json", *disk)
    assert status == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["from_s"] == 0
    assert all(row["from_s"] < row["to_s"] for row in rows)
    assert [row["to_s"] for row in rows[:-1]] == [row["from_s"] for row in rows[1:]]
    assert rows[-1]["to_s"] == 29.5
    assert rows[-1]["frames"] == 60
    assert list(tmp_path.iterdir()) == []
    assert "saw 60 frames up to 0:00:29" in err


@pytest.mark.slow
def test_questions_from_stdin(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused one does not end the conversation."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n\nIs \udcff there?\nWhere?\n"))
    status, out, err = ask("--interactive")
    assert status == 0, err
    assert len(out.splitlines()) >= 2
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: the text is not UTF-8 at character 3 ('Is \\udcff there?'): give it in UTF-8"
    ]


@pytest.mark.slow
def test_answers_without_json_show_their_span(ask: Callable[..., Any]) -> None:
    status, out, err = ask("--question", "What?", "--ask-every", 100)
    assert status == 0, err
    assert out.startswith("[0:00:00 - 0:00:29] ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--live", "--ask-every", 5), "nothing to ask"),
        (("--live", "--question", "Q", "--ask-every", 0), "--ask-every must be above 0"),
        (("--live", "--question", "Q", "--max-frames", 8), "--live takes --fps frames a second"),
        (("--live", "--question", "Q", "--offload"), "--live has no --cache"),
        (("--live", "--question", "Q", "--disk-gib", 2), "a disk budget and a folder for it go together"),
        (("--question", "Q", "--ask-every", 5), "have no effect without --live"),
    ],
)
def test_bad_flags_are_one_line(
    refused: Callable[..., str], clip: Path, checkpoint: Path, flags: tuple[object, ...], message: str
) -> None:
    assert message in refused(infer.main, "--video", clip, "--checkpoint", checkpoint, *flags)


def test_a_missing_video_is_one_line(refused: Callable[..., str], checkpoint: Path) -> None:
    said = refused(infer.main, "--video", "no.ts", "--checkpoint", checkpoint, "--live", "--question", "Q")
    assert said == "no.ts: no such video"
