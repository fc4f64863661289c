"""Needle retrieval, the bundled model, and the pictures of answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import xl2jax
from xl2jax.commands import demo_clip, infer, needle
from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.evaluation.needle import Mode, NeedleConfig, Result, make_cases, parse_modes, summary
from xl2jax.evaluation.questions import NEEDLE_KINDS
from xl2jax.evaluation.scenes import draw_scene, make_scene, scene_clip
from xl2jax.inference.answering import Answer


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_cases_cover_lengths_depths_and_kinds() -> None:
    cases = list(make_cases(NeedleConfig((64, 256), (0, 0.5, 1), 3)))
    assert len(cases) == 2 * 3 * 3
    assert len({c.scene.seed for c in cases}) == len(cases)
    for case in cases:
        assert case.scene.seed % 2 == 1
        assert {q.group for q in case.questions} == {round(case.depth * (case.frames // 4 - 1))}
        assert [q.kind for q in case.questions] == list(NEEDLE_KINDS)
        needle_itself, *others = case.scene.events
        assert len(others) == 5
        assert all(e.colour != needle_itself.colour and e.shape != needle_itself.shape for e in others)


def test_cases_about_the_whole_video() -> None:
    for case in make_cases(NeedleConfig((32,), (0.5,), 6, others=(3, 3), kinds=("exists", "count", "first"))):
        exists, count, first = case.questions
        assert exists.answer in ("Yes.", "No.")
        assert (exists.group is None) == (exists.answer == "No.")
        assert (count.answer, count.group) == (f"{len(case.scene.events)}.", None)
        assert first.answer == f"The {next(e.name for e in case.scene.events if e.start == first.group)}."
    (alone,) = make_cases(NeedleConfig((32,), (0.5,), 1, others=(0, 0), kinds=("time", "first")))
    assert [q.kind for q in alone.questions] == ["time"]
    ranged = make_cases(NeedleConfig((64,), (0.5,), 5, others=(0, 3), kinds=("count",)))
    assert [c.questions[0].answer for c in ranged] == ["1.", "2.", "3.", "4.", "1."]


@pytest.mark.parametrize("frame_seconds", [0.25, 8.0])
def test_the_clock_of_the_cases(frame_seconds: float) -> None:
    """Questions and answers have the times of the clip: of the group that shows the answer."""
    config = NeedleConfig((400,), (0.6,), 3, kinds=("colour", "time"), frame_seconds=frame_seconds)
    for case in make_cases(config):
        times = scene_clip(case.scene, 4 * frame_seconds).times
        for question in case.questions:
            assert question.group is not None
            assert f" {times[4 * question.group]} seconds" in question.text + question.answer


def test_frames_that_were_drawn_before_are_those_of_the_clip() -> None:
    scene = make_scene(7, 3, events=2)
    (read,) = scene_clip(scene).batches(12, 56)
    drawn = draw_scene(56, scene)
    assert np.array_equal(drawn, read)
    (again,) = scene_clip(scene, drawn=drawn).batches(12, 56)
    assert np.array_equal(again, read)


def test_verdicts() -> None:
    def verdict(chunked: int, best: int) -> str:
        found = [(mode, i < n) for mode, n in (("chunked", chunked), ("top2", best)) for i in range(20)]
        return needle.verdict([Result(64, 0.5, mode, "time", right, None) for mode, right in found])

    assert verdict(20, 19).startswith("This checkpoint finds needles: 20 of 20 ")
    assert "mostly finds needles: 20 of 20 questions are right after chunked prefill, and 16 of 20" in verdict(20, 16)
    assert "does not reliably find" in verdict(15, 20)


@pytest.mark.slow
def test_needle_command(checkpoint: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Random weights answer nothing; what is selected is counted, and the picture is written."""
    plot = tmp_path / "needle.png"
    status, out, err = command(
        needle.main, "--checkpoint", checkpoint, "--frames", "128", "--depths", "0,0.5", "--cases", "1", "--others", "2",
        "--modes", "chunked,top1", "--kinds", "time,colour_of", "--plot", plot, "--json",
    )  # fmt: skip
    assert status == 0, err
    report = json.loads(out)
    assert [(r["mode"], r["cases"]) for r in report["rows"]] == [("chunked", 4), ("top1", 4)]
    assert report["rows"][0]["recall"] is None
    # The first chunk is always dense: that is no merit.
    assert all((c["selected"] is None) == (c["depth"] == 0 or c["mode"] == "chunked") for c in report["cases"])
    height, width = picture(plot).shape[:2]
    assert width > 300
    assert height > 0.6 * width  # two modes across, and by content and by time below each other


def test_summary_counts() -> None:
    def result(mode: str, correct: bool, selected: bool | None) -> Result:
        return Result(64, 0.5, mode, "time", correct, selected)

    rows = summary([result("dense", True, None), result("dense", False, None), result("top1", True, True),
                    result("top1", True, False)])  # fmt: skip
    assert [(r["mode"], r["accuracy"], r["recall"], r["time"]) for r in rows] == [
        ("dense", 0.5, None, 0.5), ("top1", 1.0, 0.5, 1.0),
    ]  # fmt: skip
    other = Result(64, 0.5, "top1", "shape_of", False, True)
    (row,) = summary([result("top1", True, False), other])
    assert (row["by_content"], row["by_content_recall"], row["by_time"], row["by_time_recall"]) == (0, 1, 1, 0)
    assert (row["accuracy"], row["recall"]) == (0.5, 0.5)


@pytest.mark.slow
def test_the_bundled_model_finds_needles(command: Callable[..., tuple[int, str, str]]) -> None:
    """Fixed seeds, never trained on, 256 frames: by content and by time, among chunks that the question itself chose."""
    status, out, err = command(
        needle.main, "--checkpoint", DEFAULT_CHECKPOINT, "--frames", "256", "--depths", "0.3,0.7", "--cases", "4",
        "--modes", "dense,chunked,top2,random2", "--seed", "7", "--json",
    )  # fmt: skip
    assert status == 0, err
    found = {r["mode"]: r for r in json.loads(out)["rows"]}
    assert [r["cases"] for r in found.values()] == [40, 40, 40, 40]
    for family, floor, ceiling in (("by_content", 0.9, 0.5), ("by_time", 0.95, 0.5)):
        assert min(found[m][family] for m in ("dense", "chunked", "top2")) >= floor
        assert found["top2"][f"{family}_recall"] >= 0.9
        assert found["random2"][family] <= ceiling  # pooled KV still tells some times


@pytest.mark.slow
def test_the_bundled_model_finds_needles_in_short_videos(command: Callable[..., tuple[int, str, str]]) -> None:
    """Of two groups, the first or the last."""
    status, out, err = command(
        needle.main, "--checkpoint", DEFAULT_CHECKPOINT, "--frames", "8", "--depths", "0,1", "--cases", "3",
        "--modes", "dense,chunked,top0", "--kinds", "colour_of,shape_of,colour,shape", "--select-chunk-groups", "1",
        "--seed", "7", "--json",
    )  # fmt: skip
    assert status == 0, err
    found = {r["mode"]: r for r in json.loads(out)["rows"]}
    assert [r["cases"] for r in found.values()] == [24, 24, 24]
    assert min(r["accuracy"] for r in found.values()) >= 0.95


def test_needle_refusals(checkpoint: Path, refused: Callable[..., str]) -> None:
    def refuse(*flags: object) -> str:
        return refused(needle.main, "--checkpoint", checkpoint, *flags)

    assert "--frames" in refuse("--frames", "some")
    assert "multiples of 4" in refuse("--frames", "30")
    assert "--frames: 64,64 names one more than once" in refuse("--frames", "64,64")
    assert "--modes: top2,top2 names" in refuse("--modes", "top2,top2")
    assert "--kinds" in refuse("--kinds", "colour,size")
    assert "no such question about 8 frames" in refuse("--frames", "8", "--kinds", "first", "--others", "0")
    assert "--depths: numbers from 0 to 1" in refuse("--depths", "0,2")
    assert "relevance layers" in refuse("--relevance-layers", 0.5, 0.5)
    assert "exponent of relevance" in refuse("--relevance-exponent", 9)
    assert "question's weight" in refuse("--relevance-question-weight", 1.5)
    assert "--frame-seconds" in refuse("--frame-seconds", 0.01)
    assert "--others: a number, or a range such as 0-8" in refuse("--others", "3-")
    assert "--others" in refuse("--others", "5-3")
    assert "--processes" in refuse("--processes", -1)
    assert "--quick chooses --cases, --modes itself" in refuse("--quick", "--cases", 9, "--modes", "dense")
    assert "--modes" in refuse("--modes", "sparse")
    assert "--modes" in refuse("--modes", "top")
    assert parse_modes("dense,top12") == (Mode("dense", "dense", 0), Mode("top12", "top", 12))


@pytest.mark.slow
def test_the_study_runs(tmp_path: Path) -> None:
    """At a short length, in one dtype: it finds all needles, writes each question's scores, and draws.

    A second run asks about the videos that are missing, and gives the same table.
    """
    results, drawn = tmp_path / "study.jsonl", tmp_path / "study.png"
    flags = ["--frames", "512", "--dense-up-to", "512", "--dtypes", "float32", "--cases", "1"]
    tool = Path(__file__).parent.parent / "tools" / "needle_study.py"

    def run() -> str:
        command = [sys.executable, tool, *flags, "--json", results, "--plot", drawn]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = run()
    assert len(table.splitlines()) == 2  # one and four frames a second
    first, *rows = map(json.loads, lines := results.read_text().splitlines())
    assert (first["frames"], first["checkpoint"], len(rows)) == ("512", "demo", 6)
    assert np.mean([r["correct"] for row in rows for r in row["results"] if r["mode"] == "top2"]) > 0.9
    scores = [score for row in rows for score in row["scores"]]
    layers, heads = np.shape([r["heads"] for r in scores])[1:]
    assert (layers, heads) == (6, 4)
    assert np.mean([r["all"] for r in scores]) > 0.9
    assert picture(drawn).shape[1] > 1000

    drawn.unlink()
    results.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])  # it was killed while it wrote
    assert run() == table
    assert results.read_text().splitlines() == lines
    assert drawn.exists()


def test_the_study_refuses(tmp_path: Path, refused: Callable[..., str], load_tool: Callable[[str], ModuleType]) -> None:
    """Before a model is loaded, and without a trace on the disk."""
    study = load_tool("needle_study")

    def refuse(*flags: object) -> str:
        files = {"--json": tmp_path / "a.jsonl", "--plot": tmp_path / "a.png"} | dict(
            zip(flags[::2], flags[1::2], strict=True)
        )
        return refused(study.main, *(x for pair in files.items() for x in pair))

    assert "multiples of 4" in refuse("--frames", "64,30")
    assert "--frames: whole numbers" in refuse("--frames", "some")
    assert "--dtypes: choose from float32,bfloat16" in refuse("--dtypes", "float32,float8")
    assert "--cases" in refuse("--cases", 0)
    assert "--seed" in refuse("--seed", -1)
    assert "no such checkpoint" in refuse("--checkpoint", tmp_path / "none")
    assert "no such folder" in refuse("--plot", tmp_path / "none" / "a.png")
    assert "cannot be written" in refuse("--json", tmp_path / "none" / "a.jsonl")
    assert list(tmp_path.iterdir()) == []
    other = tmp_path / "other.json"
    for text in ('{"frames": "64"}\n{"half', '{"in": "one line"}', "words\n"):
        other.write_text(text)
        assert "other.json: " in refuse("--json", other)
        assert other.read_text() == text


def test_random_chunks_differ_by_question(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    def chosen(question: str) -> list[int]:
        answer: Answer = model.ask(
            watched, question, max_new_tokens=1, relevance=xl2jax.RelevanceConfig("random"),
        )  # fmt: skip
        return [c.number for c in answer.chunks if c.dense]

    sets = [tuple(chosen(f"What about {i}?")) for i in range(6)]
    assert sets[0] == tuple(chosen("What about 0?"))
    assert len(set(sets)) > 2
    assert all(len(s) == 4 for s in sets)


def test_plot_of_answers(
    checkpoint: Path,
    clip: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    refused: Callable[..., str],
) -> None:
    flags = ("--checkpoint", checkpoint, "--video", clip, "--question", "What?", "--max-new-tokens", 2)
    status, _, err = command(infer.main, *flags, "--plot", tmp_path / "a.png", "--cache", tmp_path / "c")
    assert status == 0, err
    status, _, err = command(infer.main, *flags, "--plot", tmp_path / "b.png", "--cache", tmp_path / "c")
    assert status == 0, err
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    assert np.abs(first.astype(float) - second).mean() < 2  # thumbnails come from frames of other sizes
    # Dense chunks, pooled chunks and the thumbnails are all there.
    for colour in ((0x2B, 0x6C, 0xB0), (0xCB, 0xD5, 0xE0), (220, 40, 40)):
        assert (np.abs(first.astype(int) - colour).max(-1) < 40).sum() > 20, colour
    assert "cannot be written (no such folder)" in refused(infer.main, *flags, "--plot", tmp_path / "none" / "a.png")


@pytest.mark.slow
def test_the_bundled_model_answers_the_demo(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Through H.264, infer.py and bi-level decoding."""
    status, out, err = command(demo_clip.main, tmp_path / "a.mp4", "--seed", 1)
    assert status == 0, err
    asked = [line.split("\t") for line in out.splitlines()]
    assert len(asked) == 3
    questions = [x for question, _ in asked for x in ("--question", question)]
    status, out, err = command(
        infer.main, "--video", tmp_path / "a.mp4", "--json", *questions
    )  # fmt: skip
    assert status == 0, err
    assert [a["answer"] for a in json.loads(out)["answers"]] == [answer for _, answer in asked]
