"""Files and folders that are often confused with a checkpoint are refused with advice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xl2jax.checkpoint import sources
from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.errors import UserError


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: files(d, "adapter_config.json", "adapter_model.safetensors"), "is an adapter (PEFT), not a whole"),
        (lambda d: files(d, "adapter_config.json", "config.json"), "merge it into its base model"),
        (
            lambda d: files(d, "metrics.jsonl", "lengths.json", "checkpoints/100/x"),
            "is the folder of a training run: run train.py again with --export DIR, and give that folder",
        ),
        (
            lambda d: files(d / "models--BAAI--Video-XL-2", "refs/main", "snapshots/abc/config.json"),
            "is a folder of the hub's cache: give the id BAAI/Video-XL-2 instead",
        ),
        (lambda d: files(d, "model-Q4_K_M.gguf"), "is a GGUF file, which cannot be read"),
        (lambda d: files(d, "m.gguf") / "m.gguf", "is a GGUF file, which cannot be read"),
        (lambda d: files(d, "m.safetensors") / "m.safetensors", "is a file of weights: give its folder"),
        (lambda d: files(d, "m.bin") / "m.bin", "m.bin is a pickle, which can run code"),
        (lambda d: files(d, "m.ckpt") / "m.ckpt", "m.ckpt is a pickle, which can run code"),
        (lambda d: files(d, "m.txt") / "m.txt", "is a file, not a checkpoint folder"),
        (lambda d: d / "none", "no such checkpoint folder"),
        (lambda d: files(d, "file") / "file" / "below", "no such checkpoint folder"),
        (lambda d: d / "a\0b", "no such checkpoint folder"),
        (lambda d: d / ("n" * 300), "cannot be read (File name too long)"),
    ],
)
def test_common_mistakes(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as e:
        find_checkpoint(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is a file of weights"):
        find_checkpoint(tmp_path / "model.safetensors")


def test_a_part_of_an_orbax_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    torch_to_orbax(checkpoint, tmp_path / "orbax", None)
    assert find_checkpoint(tmp_path / "orbax") == tmp_path / "orbax"
    with pytest.raises(UserError, match=f"give the folder {tmp_path}/orbax"):
        find_checkpoint(tmp_path / "orbax" / "params")


def test_checkpoints_with_other_files(copied: Path) -> None:
    """A complete model is accepted whatever other files its folder has."""
    files(copied, "adapter_config.json", "metrics.jsonl", "checkpoints/1/x", "model.gguf", "training_args.bin")
    assert find_checkpoint(copied) == copied


def test_a_folder_without_permission(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.os, "listdir", refuse)
    with pytest.raises(UserError, match="no permission to read it"):
        find_checkpoint(copied)
    monkeypatch.setattr(sources.os, "stat", refuse)
    with pytest.raises(UserError, match="no permission to read it"):
        find_checkpoint("a/b")


def test_a_quantised_checkpoint(copied: Path) -> None:
    from xl2jax.checkpoint.params import load_params

    raw = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(
        UserError, match=r"format that is not read \(.fp8.\): give the model as its authors released it"
    ):
        load_params(find_checkpoint(copied))
