"""`xl2jax run-batch`: OpenAI's batch lines in and out, and runs that go on."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xl2jax
from xl2jax.commands import run_batch
from xl2jax.serving import batch
from xl2jax.testing import write_clip

SAMPLING = {"fps": 2, "max_frames": 16}


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, Any]]:
    """Three questions about each of two videos, and one that names no model of here."""
    rows = []
    for name, height in (("a.mp4", 64), ("b.mp4", 66)):
        write_clip(tmp_path / name, 5, fps=8, width=64, height=height)
    for number in range(6):
        video = {"type": "video_url", "video_url": {"url": (tmp_path / "ab"[number % 2]).with_suffix(".mp4").as_uri()}}
        content = [video, {"type": "text", "text": f"What is {number}?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "xl2jax": SAMPLING}
        rows.append({"custom_id": f"row {number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    rows.append({**rows[0], "custom_id": "wrong", "body": {**rows[0]["body"], "model": "gpt"}})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def run(
    command: Callable[..., tuple[int, str, str]], checkpoint: Path, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    def rows(name: str, *flags: object) -> list[dict[str, Any]]:
        out = tmp_path / name
        given = ("-i", tmp_path / "in.jsonl", "-o", out, "--checkpoint", checkpoint, "--media-root", tmp_path)
        status, _, err = command(run_batch.main, *given, *flags)
        assert status == 0, err
        return [json.loads(line) for line in out.read_text().splitlines()]

    return rows


@pytest.mark.slow
def test_answers_are_those_of_the_library(
    run: Callable[..., list[dict[str, Any]]], lines: list[dict[str, Any]], model: xl2jax.Model, tmp_path: Path
) -> None:
    rows = {row["custom_id"]: row for row in run("out.jsonl")}
    assert set(rows) == {line["custom_id"] for line in lines}
    wrong = rows.pop("wrong")
    assert (wrong["response"]["status_code"], wrong["error"]["code"]) == (404, "model_not_found")
    for name in "ab":
        with model.watch(tmp_path / f"{name}.mp4", xl2jax.FrameSampling(**SAMPLING)) as video:
            for number in range(6):
                if "ab"[number % 2] == name:
                    row = rows[f"row {number}"]
                    text = row["response"]["body"]["choices"][0]["message"]["content"]
                    assert text == model.ask(video, f"What is {number}?", max_new_tokens=6).text
                    assert (row["response"]["status_code"], row["error"]) == (200, None)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_shards_share_a_file(
    run: Callable[..., list[dict[str, Any]]], lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, second = run("1.jsonl", "--shard", "1/2"), run("2.jsonl", "--shard", "2/2")
    ids = [sorted(row["custom_id"] for row in rows) for rows in (first, second)]
    assert ids == [["row 0", "row 2", "row 4", "wrong"], ["row 1", "row 3", "row 5"]]
    out = tmp_path / "1.jsonl"
    kept = out.read_bytes().splitlines(keepends=True)[:2]
    out.write_bytes(b"".join(kept) + b'{"custom_id": "row')  # killed in the middle of a line
    again = run("1.jsonl", "--shard", "1/2")
    assert out.read_bytes().startswith(b"".join(kept))
    assert sorted(row["custom_id"] for row in again) == ids[0]


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("", (), "holds no request"),
        ("{}\n", (), "line 1: custom_id: is missing"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}\n', (), "line 1: url"),
        ('{"custom_id": "a", "url": "/v1/chat/completions", "body": {}}\n' * 2, (), "'a' is there twice"),
        ("x\n", (), "line 1: not JSON"),
        ("{}\n", ("--shard", "3/2"), "--shard"),
        ("{}\n", ("--shard", "0/2"), "--shard"),
    ],
)
def test_wrong_input(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, text: str, flags: tuple[str, ...], words: str
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    given = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--checkpoint", checkpoint)
    assert words in refused(run_batch.main, *given, *flags)


def test_a_full_disk_is_one_line(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batch, "append_line", full)
    (tmp_path / "in.jsonl").write_text(
        "".join(f'{{"custom_id": "{n}", "url": "/v1/chat/completions", "body": {{}}}}\n' for n in range(3))
    )
    given = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--checkpoint", checkpoint)
    assert "out.jsonl: cannot be written (No space left on device)" in refused(run_batch.main, *given)
