"""infer.py with pictures: answers, caches on disk, bad input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import xl2jax
from xl2jax.commands import infer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (70, 140, 3)), ("small.jpg", (30, 40, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    return folder / "wide.png", folder / "small.jpg"


@pytest.fixture
def flags(pictures: tuple[Path, Path], checkpoint: Path) -> tuple[object, ...]:
    return ("--image", pictures[0], "--image", pictures[1], "--checkpoint", checkpoint, "--max-new-tokens", 4)


@pytest.mark.slow
def test_answers_about_pictures(
    command: Callable[..., tuple[int, str, str]],
    flags: tuple[object, ...],
    pictures: tuple[Path, Path],
    model: xl2jax.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command line gives the API's answer, and again from its cache, which other pictures or places do not match."""
    question = ("--question", "Left: <image> Right: <image> Which is larger?")
    file = tmp_path / "pictures.kv"
    status, out, err = command(infer.main, *flags, *question, "--cache", file, "--json")
    assert status == 0, err
    made = json.loads(out)
    seen = model.see(pictures, "Left: <image> Right: <image>")
    assert made["answers"][0]["answer"] == model.ask(seen, " Which is larger?", max_new_tokens=4).text
    assert (made["video"], made["frames"]) == (None, 0)
    assert made["images"] == [str(path) for path in pictures]
    assert made["tokens"]["pictures"] == 3 * model.config.tile_tokens
    status, out, err = command(infer.main, *flags, *question, "--cache", file, "--json")
    assert "reading" in err
    assert json.loads(out)["answers"][0]["answer"] == made["answers"][0]["answer"]
    monkeypatch.setattr("sys.stdin", io.StringIO("<image> again?\n"))
    status, out, err = command(infer.main, *flags, *question, "--cache", file, "--json", "--interactive")
    assert "error: <image> names the place of a picture in --question only" in err
    assert len(json.loads(out)["answers"]) == 1
    for other, words in (
        (("--question", "Which?"), "text"),
        (("--image", pictures[0], *question), "<image>|other pictures"),
    ):
        status, out, err = command(infer.main, *flags, *other, "--cache", file)
        assert status == 2
        assert any(word in err for word in words.split("|"))


def test_text_alone(command: Callable[..., tuple[int, str, str]], checkpoint: Path, model: xl2jax.Model) -> None:
    flags = ("--text-only", "--checkpoint", checkpoint, "--max-new-tokens", 4, "--question", "How are you?")
    status, out, err = command(infer.main, *flags)
    assert status == 0, err
    assert out.rstrip("\n") == model.ask(model.see([]), "How are you?", max_new_tokens=4).text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--question", "<image> a", "--question", "b"), "different places"),
        (("--question", "a", "--max-frames", 8), "without a video"),
        (("--question", "a", "--plot", "x.png"), "without a video"),
        (("--question", "a", "--text-only"), "leave it out"),
        (("--question", "a", "--image", "nowhere.png"), "no such"),
        (("--question", "a", "--images-as-frames", "--fps", 2), "leave out the flags"),
        (("--question", "a <image>", "--images-as-frames"), "<image> has no place"),
        (("--question", "a <image>"), "1 times for 2 pictures"),
    ],
)
def test_wrong_flags(
    changed: tuple[object, ...], words: str, refused: Callable[..., str], flags: tuple[object, ...]
) -> None:
    assert words in refused(infer.main, *flags, *changed)


def test_nothing_to_look_at(refused: Callable[..., str]) -> None:
    assert "--text-only" in refused(infer.main, "--question", "What?")


def test_bad_pictures_are_refused_before_weights_are_read(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(xl2jax, "load", load)
    (tmp_path / "text.png").write_text("no picture")
    assert "not an image" in refused(infer.main, "--image", tmp_path / "text.png", "--question", "What?")
