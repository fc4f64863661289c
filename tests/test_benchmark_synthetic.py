"""The synthetic data set, asked of the bundled checkpoint in the three settings."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xl2jax
from xl2jax.benchmarks.dataset import DataFolder
from xl2jax.benchmarks.synthetic import Sizes, write_synthetic
from xl2jax.benchmarks.tasks import find_task
from xl2jax.commands import evaluate
from xl2jax.video.clip import open_video

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "demo"
SETTINGS = ("pure", "chunked", "bilevel")

type Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 24 groups, 3 questions each."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    assert write_synthetic(folder, Sizes(videos=2, groups=(24, 24, 24))) == 6
    return folder


def run(command: Command, data: Path, out: Path, setting: str, *further: object) -> dict[str, Any]:
    given = ("--task", "synthetic", "--data", data, "-o", out, "--setting", setting, "--json", *further)
    status, printed, err = command(evaluate.main, *given)
    assert status == 0, err
    (row,) = json.loads(printed)["tasks"]
    return row


def records(out: Path) -> list[dict[str, Any]]:
    lines = (out / "answers-0-of-1.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_the_bundled_checkpoint_answers(command: Command, small: Path, tmp_path: Path) -> None:
    rows = {setting: run(command, small, tmp_path / setting, setting) for setting in SETTINGS}
    assert {setting: (row["value"], row["answered"], row["not_parsed"]) for setting, row in rows.items()} == (
        dict.fromkeys(SETTINGS, (100.0, 6, 0))
    )
    assert [[r.get("dense", True) for r in records(tmp_path / s)] for s in SETTINGS] == [
        [True] * 6,
        [True] * 6,
        [False] * 6,
    ]
    context = {s: records(tmp_path / s)[0]["input_tokens"] for s in SETTINGS}
    assert context["pure"] == context["chunked"] > context["bilevel"]
    status, out, _ = command(evaluate.main, "compare", tmp_path / "pure", tmp_path / "bilevel", "--json")
    (found,) = json.loads(out)["tasks"]
    assert (status, found["questions"], found["same_score"], found["p"]) == (0, 6, 6, 1.0)


def test_answers_are_those_of_the_library(
    small: Path,
    command: Command,
    tmp_path: Path,
    checkpoint: Path,
    model: xl2jax.Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a last group that is filled."""
    monkeypatch.setattr(xl2jax, "load_copies", lambda *args, **options: [model])
    data = DataFolder(small)
    task = find_task("synthetic", "upstream")
    row = data.rows(task)[0]
    given = ("--task", "synthetic", "--data", small, "-o", tmp_path, "--setting", "chunked", "--limit", 1)
    status, _, err = command(evaluate.main, *given, "--max-frames", 30, "--checkpoint", checkpoint)
    assert status == 0, err
    (record,) = records(tmp_path)
    video = data.find(task, f"{row.videoID}.mp4")
    assert video is not None
    sampling = xl2jax.FrameSampling(max_frames=30, times="upstream")
    clip = open_video(video, sampling, last_group="fill")
    assert clip.indices.tolist()[-4:] == [91, 95, 95, 95]
    assert (record["frames"], len(open_video(video, sampling).indices)) == (32, 28)
    with model.watch(clip, None, xl2jax.PrefillConfig(4, 3)) as watched:
        answer = model.ask(watched, task.prompt(row), max_new_tokens=16, bilevel=None)
    assert record["text"] == answer.text.strip()
    assert record["prompt"] == task.prompt(row)
    assert record["output_tokens"] == answer.new_tokens


@pytest.mark.slow
def test_a_selection_file_chooses(small: Path, command: Command, tmp_path: Path, checkpoint: Path) -> None:
    """Questions with an entry read the chunks that it names; all others read the whole cache."""
    task = find_task("videomme", "upstream")
    row = DataFolder(small).rows(task)[0]
    config = {"selected_topk": None, "selected_chunk_size": 2, "compression": 4}
    entries = {f"{row.videoID}.mp4_{row.question}": [3]}
    file = tmp_path / "videomme_short.json"
    file.write_text(json.dumps({"x": {"config": config, "selected_unit_indices": entries}, "y": None}))
    given = ("--task", "videomme", "--data", small, "-o", tmp_path / "out", "--selection", file, "--limit", 2)
    status, _, err = command(evaluate.main, *given, "--setting", "bilevel", "--checkpoint", checkpoint)
    assert status == 0, err
    first, second = records(tmp_path / "out")
    assert (first["dense"], second.get("dense", True)) == (False, True)
    assert first["input_tokens"] < second["input_tokens"] - 50
    asked = json.loads((tmp_path / "out" / "run.json").read_text())["asked"]
    assert list(asked["tasks"]["videomme"]["view"]["bilevel"]) == ["selection"]


def test_wrong_sizes(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "--videos" in refused(evaluate.main, "synthetic", tmp_path / "x", "--videos", 0)
    assert "--groups" in refused(evaluate.main, "synthetic", tmp_path / "x", "--groups", 1, 2, 3)
    assert "already exists" in refused(evaluate.main, "synthetic", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_longer_videos_in_the_three_settings(command: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert command(evaluate.main, "synthetic", data, "--groups", 24, 32, 48)[0] == 0
    rows = {setting: run(command, data, tmp_path / setting, setting) for setting in SETTINGS}
    assert min(row["value"] for row in rows.values()) >= 95
    # Without any chunk but the first and the last, the answers are worse: the settings do differ.
    none = run(command, data, tmp_path / "none", "bilevel", "--top-chunks", 0)
    assert none["value"] < 80
    status, out, _ = command(evaluate.main, "compare", tmp_path / "none", tmp_path / "bilevel", "--json")
    (found,) = json.loads(out)["tasks"]
    assert status == 0
    assert found["only_second_right"] > found["only_first_right"]
    assert found["p"] < 0.01


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_of_the_bundled_checkpoint_that_is_killed(command: Command, tmp_path: Path) -> None:
    """200 questions, killed at 10 random points, and an uninterrupted run."""
    data, killed = tmp_path / "data", tmp_path / "killed"
    assert write_synthetic(data, Sizes(videos=67, groups=(6, 8, 10))) >= 200
    given = ["--task", "synthetic", "--data", str(data), "--setting", "bilevel", "--limit", "200"]
    answers, rng, lengths = killed / "answers-0-of-1.jsonl", random.Random(3), [0]
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-m", "xl2jax", "eval", *given, "-o", str(killed)], stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 120
        while time.monotonic() < end and (not answers.exists() or answers.stat().st_size <= lengths[-1]):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        lengths.append(answers.stat().st_size)
    assert lengths == sorted(set(lengths))
    for out in (killed, tmp_path / "whole"):
        assert command(evaluate.main, *given, "-o", out)[0] == 0
    pages = [(out / "report.md").read_text().partition("## Time")[0] for out in (killed, tmp_path / "whole")]
    assert pages[0] == pages[1]
    assert len(answers.read_text().splitlines()) == 200
