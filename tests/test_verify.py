"""The whole model against tensors of upstream, through `xl2jax verify`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xl2jax.commands import verify
from xl2jax.evaluation.case import Case
from xl2jax.evaluation.verify import LIMITS, compare, dense_outputs
from xl2jax.models.param_tree import flatten


def check_all_there(report: dict[str, Any], folder: Path, *, trained: bool) -> None:
    """Every expected tensor has a row within its limit, gradients too where `trained`."""
    assert report["passed"]
    names = {row["name"] for row in report["rows"]}
    for path in (folder / "expected").glob("*.safetensors"):
        if trained or path.stem != "train_grads":
            assert set(load_file(path)) <= names
    assert ("loss" in names) == trained
    norm = "|model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight|"
    assert (norm in names) == trained


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tiny", "wide"])
def test_float64_agrees_on_any_machine(case: str, goldens: Path) -> None:
    """All stages, masks, caches, logits, losses and gradients agree to 1e-9. Rounding differs by up to 1e-11.

    It runs in another process, since JAX's 64-bit mode is process-wide.
    """
    command = [sys.executable, "-m", "xl2jax", "verify", str(goldens / case), "--dtype", "float64", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    assert report["dtype"] == "float64"
    (found,) = report["cases"]
    check_all_there(found, goldens / case, trained=True)
    assert max(row["relative_l2"] for row in found["rows"]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("case", "trained"), [("geometry", False), ("wide", True)])
def test_float32_agrees(case: str, trained: bool, goldens: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """One case has the released image geometry. The other one has gradients that float32 can decide."""
    status, out, err = command(verify.main, goldens / case, "--json")
    assert status == 0, err
    check_all_there(json.loads(out)["cases"][0], goldens / case, trained=trained)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pictures_agree(dtype: str, goldens: Path) -> None:
    """Tiles, all stages, prompts with several pictures and beside a video, and in float64 losses and gradients."""
    folder = goldens / "images_tiny"
    command = [sys.executable, "-m", "xl2jax", "verify", str(folder), "--dtype", dtype, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    assert report["passed"]
    names = {row["name"] for row in report["cases"][0]["rows"]}
    expected = folder / ("expected64" if dtype == "float64" else "expected")
    assert set(load_file(expected / "dense.safetensors")) <= names
    assert ("one+text: loss" in names) == (dtype == "float64")


def test_pictures_are_compared_as_they_are(goldens: Path, refused: Callable[..., str]) -> None:
    assert "leave them out" in refused(verify.main, goldens / "images_tiny", "--cache-dtype", "int8")


@pytest.mark.slow
def test_int8_kv_agrees_within_its_rounding(goldens: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Outputs agree with upstream's within the 1 % that 8 bits cost, and all generated ids are equal."""
    status, out, err = command(verify.main, goldens / "tiny", "--only", "bilevel", "--cache-dtype", "int8", "--json")
    assert status == 0, err
    by_name = {r["name"]: r["relative_l2"] for r in json.loads(out)["cases"][0]["rows"]}
    assert by_name["bilevel0_generated"] == 0
    assert 1e-4 < by_name["bilevel0_suffix_logits"] < 1e-2  # 8 bits are really used


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "low", "high"), [("int8", 1e-3, 5e-2), ("int4", 5e-2, 0.5)])
def test_quantised_weights_agree_within_their_rounding(
    weights: str, low: float, high: float, goldens: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = command(verify.main, goldens / "tiny", "--only", "bilevel", "--weights", weights, "--json")
    assert status == 0, err
    by_name = {r["name"]: r["relative_l2"] for r in json.loads(out)["cases"][0]["rows"]}
    assert low < by_name["bilevel0_suffix_logits"] < high  # so many bits are really used


def test_quantised_weights_have_no_gradients(goldens: Path, refused: Callable[..., str]) -> None:
    flags = ("--weights", "int8", "--dtype", "float64")
    assert "leave out train" in refused(verify.main, goldens / "tiny", "--only", "train", *flags)
    assert "train" not in verify._sections(goldens / "tiny", verify.Args((), dtype="float64", weights="int8"))


def test_float32_decides_no_gradient_at_width_32(
    goldens: Path, command: Callable[..., tuple[int, str, str]], refused: Callable[..., str]
) -> None:
    assert "use --dtype float64" in refused(verify.main, goldens / "tiny", "--only", "train", "--json")
    assert verify._sections(goldens / "tiny", verify.Args((), dtype="float64"))[-1] == "train"
    assert "train" not in verify._sections(goldens / "tiny", verify.Args(()))


def test_a_difference_beyond_the_limit_fails() -> None:
    """Each kind of row passes just within its limit and fails just beyond it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 30))
    off = rng.standard_normal(x.shape)
    off /= np.linalg.norm(off) / np.linalg.norm(x)
    for limit in (*vars(LIMITS["float64"]).values(), *vars(LIMITS["float32"]).values()):
        assert compare("logits", x, x + 0.9 * limit * off, None, limit=limit).ok
        assert not compare("logits", x, x + 1.1 * limit * off, None, limit=limit).ok
    ids = np.arange(8)
    assert compare("generated", ids, np.arange(12), None, limit=1).ok  # upstream stopped at its end token
    assert not compare("generated", ids, ids + (ids == 7), None, limit=1).ok
    assert not compare("mask", ids % 2, np.zeros(8, int), None, limit=1).ok
    assert not compare("logits", x, x[:-1], None, limit=1).ok
    assert not compare("logits", x, np.full_like(x, np.nan), None, limit=1).ok
    assert compare("dts", x[:5], x, 5, limit=1e-12).ok


@pytest.mark.slow
def test_bfloat16_errs_as_much_as_rounding_the_weights(goldens: Path, tmp_path: Path) -> None:
    """Against upstream's float64, bfloat16 must not be much worse than rounding the weights alone.

    The yardstick is the error of the same weights rounded to bfloat16 and computed in float32, which has the
    conditioning of this case.
    """
    expected = load_file(goldens / "wide" / "expected" / "dense.safetensors")
    names = {"visual_tokens", "logits"}

    def error(case: Case) -> dict[str, float]:
        outputs = dense_outputs(case, names)
        return {n: float(np.linalg.norm(outputs[n].astype(np.float64) - expected[n])) for n in names}

    case = Case(goldens / "wide", tmp_path / "checkpoint")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), case.network.params)
    case.network = dataclasses.replace(case.network, params=rounded)
    yardstick = error(case)
    half = Case(goldens / "wide", tmp_path / "again", dtype="bfloat16")
    assert {str(x.dtype) for x in flatten(half.network.params).values()} == {"bfloat16"}
    computed = error(half)
    for name in names:
        assert 0 < yardstick[name] < 0.2 * np.linalg.norm(expected[name])
        assert computed[name] < 3 * yardstick[name], (name, computed[name] / yardstick[name])


@pytest.fixture
def case(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "tiny", tmp_path / "case"))


@pytest.mark.slow
def test_a_wrong_tensor_fails(case: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    path = case / "expected" / "dense.safetensors"
    tensors = {k: x for k, x in load_file(path).items() if k in ("dts", "interpolated", "visual_tokens", "projected")}
    tensors["dts"] = tensors["dts"] * 1.001
    tensors["projected"][0, 0, 0] += 1
    save_file(tensors, path)
    status, out, err = command(verify.main, case, "--only", "dense")
    wrong = {line.split()[0] for line in out.splitlines() if "WRONG" in line}
    assert status == 1
    assert wrong == {"dts", "projected"}
    assert "2 of 4 tensors differ" in err


@pytest.mark.slow
def test_unknown_tensor_is_an_error(case: Path, refused: Callable[..., str]) -> None:
    path = case / "expected" / "dense.safetensors"
    save_file({"attention_of_layer_7": np.zeros(3, np.float32)}, path)
    assert "holds unknown tensors: attention_of_layer_7" in refused(verify.main, case, "--only", "dense", "--json")


def test_not_a_case(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no case.json" in refused(verify.main, tmp_path, "--json")
    assert "--only" in refused(verify.main, tmp_path, "--only", "dens", "--json")
    assert "no case folder" in refused(verify.main, "--json")
