"""The command line of infer.py: answers, JSON, caches on disk, bad input."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_video import write_audio

import xl2jax
from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.commands import infer
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.prefill import make_plan
from xl2jax.prompt import PREFIX, PromptTokenizer
from xl2jax.testing import write_clip

QUESTION = "Which shape is red?"
FAST = ("--fps", 2, "--max-frames", 40, "--max-new-tokens", 6)


def test_answer_on_stdout_the_rest_on_stderr(ask: Callable[..., Any], model: xl2jax.Model, clip: Path) -> None:
    status, out, err = ask("--question", QUESTION)
    assert status == 0, err
    video = model.watch(clip, xl2jax.FrameSampling(fps=2, max_frames=40))
    assert out == model.ask(video, QUESTION, max_new_tokens=6).text + "\n"
    for word in ("load", "read", "compute", "tokens/s", "peak memory", "cut off at 6 tokens (--max-new-tokens)"):
        assert word in err


def test_json(ask: Callable[..., Any], clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    status, out, err = ask("--question", QUESTION, "--question", "Why?", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert (report["video"], report["frames"], report["groups"]) == (str(clip), 40, 10)
    assert report["duration_s"] == 30.0
    # There are 10 groups, each with a time and 4 visual tokens.
    assert report["tokens"]["video"] > 10 * (4 + 5)
    assert [a["question"] for a in report["answers"]] == [QUESTION, "Why?"]
    assert all(1 <= a["new_tokens"] <= 6 for a in report["answers"])
    chunks = report["answers"][0]["chunks"]
    assert [c["number"] for c in chunks] == [1, 2, 3]
    assert all(isinstance(c["score"], float) for c in chunks)
    assert [a["finish_reason"] for a in report["answers"]] == [
        "length" if a["new_tokens"] == 6 else "stop" for a in report["answers"]
    ]
    assert {"load", "read", "compute"} == set(report["timings"])
    assert report["peak_memory_bytes"] > 1e7
    assert report["versions"]["jax"]
    # The Orbax checkpoint gives the same answer.
    torch_to_orbax(checkpoint, tmp_path / "orbax", None)
    _, out, _ = ask("--checkpoint", tmp_path / "orbax", "--question", QUESTION, "--json")
    assert json.loads(out)["answers"][0]["answer"] == report["answers"][0]["answer"]


def test_interactive_keeps_earlier_turns(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nAnd then?\n"))
    status, out, err = ask("--interactive", "--json")
    assert status == 0, err
    first, second = json.loads(out)["answers"]
    assert (first["question"], second["question"]) == ("What is it?", "And then?")
    assert second["suffix_tokens"] > first["suffix_tokens"] + first["new_tokens"]


def test_dense_reading_and_sampling(ask: Callable[..., Any], model: xl2jax.Model, clip: Path) -> None:
    status, out, err = ask("--question", QUESTION, "--json", "--window-chunks", "all", "--top-chunks", "all")
    assert status == 0, err
    video = model.watch(
        clip, xl2jax.FrameSampling(fps=2, max_frames=40), PrefillConfig(window_chunks=None), bilevel=None
    )
    expected = model.ask(video, QUESTION, max_new_tokens=6, bilevel=None)
    answer = json.loads(out)["answers"][0]
    assert (answer["answer"], answer["chunks"]) == (expected.text, [])
    status, out, err = ask("--question", QUESTION, "--json", "--temperature", 0.7, "--seed", 3, "--top-chunks", 1)
    assert status == 0, err
    answer = json.loads(out)["answers"][0]
    assert sum(c["dense"] for c in answer["chunks"]) == 3


def test_cache_on_disk(ask: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "video.cache"
    _, made, _ = ask("--question", QUESTION, "--json", "--cache", file)
    status, loaded, err = ask("--question", QUESTION, "--json", "--cache", file)
    assert status == 0, err
    assert "reading the video's KV from this file" in err
    a, b = json.loads(made), json.loads(loaded)
    assert a["answers"][0]["answer"] == b["answers"][0]["answer"]
    assert [c["score"] for c in a["answers"][0]["chunks"]] == pytest.approx(
        [c["score"] for c in b["answers"][0]["chunks"]]
    )
    assert a["tokens"] == b["tokens"]
    assert list(tmp_path.iterdir()) == [file]


def test_cache_of_something_else(
    refused: Callable[..., str], ask: Callable[..., Any], clip: Path, checkpoint: Path, copied: Path, tmp_path: Path
) -> None:
    file = tmp_path / "video.cache"
    assert ask("--question", QUESTION, "--cache", file)[0] == 0

    def load(video: Path, folder: Path, *flags: object) -> str:
        return refused(
            infer.main, "--video", video, "--checkpoint", folder, *FAST, *flags, "--question", QUESTION, "--cache", file
        )

    other = tmp_path / "other.mp4"
    write_clip(other, 2, fps=10, width=64, height=48)
    assert "made from another video" in load(other, checkpoint)
    assert "other sampling settings (max_frames was 40, now it is 44)" in load(clip, checkpoint, "--max-frames", 44)
    assert "other prefill settings (window_chunks was 3, now it is 1)" in load(clip, checkpoint, "--window-chunks", 1)
    assert "made from dtype float32, not bfloat16" in load(clip, checkpoint, "--dtype", "bfloat16")
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, copied / "model.safetensors")
    assert "made from another checkpoint" in load(clip, copied)
    file.write_bytes(file.read_bytes()[:-50])
    assert "not a complete video cache" in load(clip, checkpoint)
    save_file({"x": np.zeros(2, np.float32)}, file)
    assert "not a video cache" in load(clip, checkpoint)


def selection_file(tmp_path: Path, units: list[int]) -> Path:
    config = {"selected_topk": 8, "selected_chunk_size": 2, "compression": 4, "relevance oracle": "x"}
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({"any": {"config": config, "selected_unit_indices": {f"clip.mp4_{QUESTION}": units}}}))
    return path


def test_selection_from_a_file(
    model: xl2jax.Model, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Python interface reads upstream's selection files."""
    file = selection_file(tmp_path, [2, 3])
    relevance = xl2jax.RelevanceConfig("file", file=file)
    video = model.watch(clip, xl2jax.FrameSampling(fps=2, max_frames=40))
    answer = model.ask(video, QUESTION, max_new_tokens=6, relevance=relevance)
    assert [c.number for c in answer.chunks if c.dense] == [1, 3, 4, 5]
    with pytest.raises(UserError, match=r"no entry for clip.mp4 and 'Other\?'"):
        model.ask(video, "Other?", relevance=relevance)
    with caplog.at_level("INFO", "xl2jax"):
        relaxed = xl2jax.RelevanceConfig("file", file=file, missing="dense")
        assert model.ask(video, "Other?", max_new_tokens=6, relevance=relaxed).chunks == []
    assert "reading the whole dense cache" in caplog.text
    selection_file(tmp_path, [2, 77])
    with pytest.raises(UserError, match="selects unit 77, the video has 5"):
        model.ask(video, QUESTION, relevance=relevance)


BAD = [
    (("--question", " "), "the question is empty"),
    ((), "nothing to ask"),
    (("--question", QUESTION, "--fps", 0), "fps must be above 0"),
    (("--question", QUESTION, "--max-frames", 2), "max frames must be a whole number from 4 to"),
    (("--question", QUESTION, "--max-new-tokens", 0), "max new tokens must be a whole number from 1"),
    (("--question", QUESTION, "--top-p", 1.5), "top-p"),
    (("--question", QUESTION, "--temperature", -1), "temperature"),
    (("--question", QUESTION, "--window-chunks", -1), "window chunks"),
    (("--question", QUESTION, "--pool", 0), "pool must be"),
    (("--question", QUESTION, "--top-chunks", 9), "top chunks must be from 0 to 3 (the video has 3 chunks), not 9"),
    (("--question", QUESTION, "--checkpoint", "/nowhere"), "no such checkpoint folder"),
    (("--question", QUESTION, "--cache", "/nowhere/x"), "cannot be written (no such folder)"),
    (("--question", QUESTION, "--cache", "/etc/passwd/x"), "cannot be written"),
    (("--question", QUESTION, "--temperature", "nan"), "temperature"),
    (("--question", QUESTION, "--folder-fps", "nan"), "folder fps"),
    (("--question", QUESTION, "--seed", -1), "seed must be"),
    (("--question", QUESTION, "--offload", "--top-chunks", "all"), "--offload has no use"),
    (("--question", QUESTION, "--max-new-tokens", 10**9), "max new tokens must be a whole number"),
    (("--question", QUESTION, "--pool", 99), "pool must be from 1 to 4"),
    (("--question", QUESTION, "--window-chunks", 10**20), "window chunks must be a whole number"),
    (("--question", QUESTION, "--pool", 8, "--top-chunks", "all"), "--pool has no effect"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_options(flags: tuple, message: str, refused: Callable[..., str], clip: Path, checkpoint: Path) -> None:
    assert message in refused(infer.main, "--video", clip, "--checkpoint", checkpoint, *FAST, *flags)


def test_bad_videos(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    def line(video: Path) -> str:
        return refused(infer.main, "--video", video, "--checkpoint", checkpoint, *FAST, "--question", QUESTION)

    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    assert "text.mp4: not a video" in line(tmp_path / "text.mp4")
    assert "no such video" in line(tmp_path / "missing.mp4")
    (tmp_path / "empty").mkdir()
    assert "holds no frames" in line(tmp_path / "empty")
    for i in range(4):
        (tmp_path / "empty" / f"{i}.png").write_bytes(b"no image")
    assert "0.png: not an image" in line(tmp_path / "empty")
    write_audio(tmp_path / "audio.wav")
    assert "holds no video (only audio)" in line(tmp_path / "audio.wav")


def test_cut_off_video_is_answered_with_a_warning(
    command: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.mkv"
    write_clip(whole, 20, fps=10, width=96, height=64)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    flags = ("--checkpoint", checkpoint, *FAST, "--question", QUESTION, "--json")
    status, out, err = command(infer.main, "--video", tmp_path / "cut.mkv", *flags)
    assert status == 0, err
    assert "the file is cut off, last good time" in err
    assert 4 <= json.loads(out)["frames"] < 40


def test_a_bad_video_is_refused_before_a_checkpoint_is_read(refused: Callable[..., str], tmp_path: Path) -> None:
    """The real weights take minutes to read."""
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    flags = ("--checkpoint", tmp_path / "missing", *FAST, "--question", QUESTION)
    assert "text.mp4: not a video" in refused(infer.main, "--video", tmp_path / "text.mp4", *flags)


def test_files_that_would_overwrite_one_another(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_text("a video")
    flags = ("--video", tmp_path / "v.mp4", "--question", QUESTION)
    assert "name the same file" in refused(infer.main, *flags, "--cache", tmp_path / "v.mp4")
    assert "name the same file" in refused(
        infer.main, *flags, "--cache", tmp_path / "a", "--plot", tmp_path / "." / "a"
    )
    assert (tmp_path / "v.mp4").read_text() == "a video"


def test_questions_that_are_not_utf_8(
    ask: Callable[..., Any], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latin-1 bytes reach Python as lone surrogates; in a conversation they are refused and do not end it."""
    assert "not UTF-8 at character 3" in refused(infer.main, "--video", "/none", "--question", "caf\udce9?")
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9?\nWhat is it?\n"))
    status, out, err = ask("--interactive", "--json")
    assert status == 0, err
    assert "error: the text is not UTF-8" in err
    assert [a["question"] for a in json.loads(out)["answers"]] == ["What is it?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9?\n"))
    status, out, err = ask("--interactive", "--json")  # nothing was answered
    assert (status, json.loads(out)["answers"]) == (2, [])


def test_bad_checkpoints(refused: Callable[..., str], clip: Path, copied: Path) -> None:
    def line() -> str:
        return refused(infer.main, "--video", clip, "--checkpoint", copied, *FAST, "--question", QUESTION)

    weights, tokenizer = copied / "model.safetensors", copied / "tokenizer.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    assert "not a whole safetensors file" in line()
    weights.unlink()
    assert "no safetensors file" in line()
    weights.write_bytes(whole)
    shutil.move(tokenizer, copied / "elsewhere")
    assert "no tokenizer.json" in line()
    raw = json.loads((copied / "elsewhere").read_text())
    raw["added_tokens"] = raw["added_tokens"][:-1]
    tokenizer.write_text(json.dumps(raw))
    assert "lacks the special token" in line()


def test_a_video_too_long_for_memory(
    refused: Callable[..., str],
    command: Callable[..., Any],
    clip: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message names a number of frames, and that many fit."""
    flags = ("--video", clip, "--checkpoint", checkpoint, "--max-new-tokens", 2, "--question", QUESTION)
    config = VideoXL2Config.from_hf(checkpoint)
    tokenizer = PromptTokenizer.load(checkpoint, config.llm.vocab)
    layout = VideoLayout(
        len(tokenizer.encode(*PREFIX)), (len(tokenizer.encode("Time 12.0s:")),) * 20, config.visual_tokens
    )
    plan = make_plan(layout, PrefillConfig(), "cpu")
    free = memory.memory_need(config, plan, layout, xl2jax.BilevelConfig(), "float32", "cpu").total
    monkeypatch.setattr(memory, "available_bytes", lambda *_: free)
    line = refused(infer.main, *flags, "--max-frames", 120)
    assert "120 frames need" in line
    frames = int(line.split("--max-frames ")[1].split(")")[0])
    assert 4 <= frames < 120
    assert command(infer.main, *flags, "--max-frames", frames)[0] == 0
    assert "frames need" in refused(infer.main, *flags, "--max-frames", frames + 20)
