"""The whole model against upstream's own numbers, through the command that users run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xl2jax import verify


@pytest.mark.parametrize("case", ["tiny", "geometry"])
def test_goldens(case: str, goldens: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = command(verify.main, goldens / case, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["passed"]
    names = {row["name"] for row in report["rows"]}
    for path in (goldens / case / "expected").glob("*.safetensors"):
        assert set(load_file(path)) <= names
    trained = case == "tiny"
    assert ("loss" in names) == trained
    assert ("|model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight|" in names) == trained
    # The tolerance of the command is 1e-4 (gradients 1e-3); float32 is well below it.
    forward = set(names) - {n for n in names if n.startswith(("|", "model.", "global gradient"))}
    assert max(row["relative_l2"] for row in report["rows"] if row["name"] in forward) < 2e-5


def test_a_wrong_gradient_fails(case: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    path = case / "expected" / "train.json"
    sample = json.loads(path.read_text())
    sample["loss"] *= 1 + 1e-4
    sample["grad_norms"]["model.mm_projector.2.weight"] *= 1.01
    path.write_text(json.dumps(sample))
    status, out, _ = command(verify.main, case, "--only", "train")
    assert status == 1
    assert {line.split()[0] for line in out.splitlines() if "WRONG" in line} == {
        "loss",
        "|model.mm_projector.2.weight|",
    }


@pytest.fixture
def case(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "tiny", tmp_path / "case"))


def change(case: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    path = case / "expected" / "dense.safetensors"
    tensors = load_file(path)
    tensors[name] = edit(tensors[name])
    save_file(tensors, path)


def test_a_wrong_tensor_fails(case: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    change(case, "dts", lambda x: x * 1.001)
    change(case, "generated", lambda x: np.concatenate([x[:-1], x[-1:] ^ 1]))
    for name in ("logits", "inputs_embeds", "projected", "vision_features", "visual_tokens_e2e"):
        drop(case, name)
    status, out, _ = command(verify.main, case, "--only", "dense")
    wrong = {line.split()[0] for line in out.splitlines() if "WRONG" in line}
    assert status == 1
    assert wrong == {"dts", "generated"}


def drop(case: Path, name: str) -> None:
    path = case / "expected" / "dense.safetensors"
    save_file({k: x for k, x in load_file(path).items() if k != name}, path)


def test_unknown_tensor_is_an_error(case: Path, refused: Callable[..., str]) -> None:
    path = case / "expected" / "dense.safetensors"
    save_file({"attention_of_layer_7": np.zeros(3, np.float32)}, path)
    assert "tensors unknown here: attention_of_layer_7" in refused_after_header(refused, case)


def refused_after_header(refused: Callable[..., str], case: Path) -> str:
    return refused(verify.main, case, "--only", "dense", "--json")


def test_not_a_case(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no case.json" in refused(verify.main, tmp_path, "--json")
    assert "--only" in refused(verify.main, tmp_path, "--only", "dens", "--json")
