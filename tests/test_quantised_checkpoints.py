"""Checkpoints in 8 and 4 bits: converted, loaded, damaged, contradicted, and those of others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xl2jax
from xl2jax.checkpoint.convert import orbax_to_torch, torch_to_orbax
from xl2jax.checkpoint.params import load_params
from xl2jax.checkpoint.safetensors_io import SINGLE
from xl2jax.commands import convert, demo_clip, infer, needle
from xl2jax.config import PRESETS, Weights
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.models.param_tree import flatten

type Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def stored(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in 8 bits. Read only."""
    folder = tmp_path_factory.mktemp("stored") / "int8"
    torch_to_orbax(checkpoint, folder, None, "int8")
    return folder


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_stored_checkpoint_is_what_loading_makes(
    weights: Weights, checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    folder, back = tmp_path / weights, tmp_path / "back"
    status, _, err = command(convert.main, checkpoint, folder, "--dtype", "bfloat16", "--weights", weights)
    assert status == 0, err
    manifest = json.loads((folder / "xl2jax.json").read_text())
    assert (manifest["format"], manifest["weights"], manifest["dtype"]) == (3, weights, "bfloat16")
    made, read = load_params(checkpoint, "bfloat16", weights), load_params(folder)
    assert made[0] == read[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), made[1], read[1]))
    # Back in the PyTorch layout, matrices are unpacked: quantised again, each is what it was.
    assert command(convert.main, folder, back, "--reverse", "--dtype", "float32")[0] == 0
    again = flatten(load_params(back, "bfloat16", "int8")[1])
    if weights == "int8":
        assert all(np.array_equal(x, again[n]) for n, x in flatten(read[1]).items() if n.endswith(".codes"))
    assert load_params(back)[0].llm.weights is None


def test_no_whole_tensor_is_kept_in_16_bits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the device is what the parameters are: no kernel of the LLM among it."""
    sent: list[int] = []
    put = memory.jnp.asarray
    monkeypatch.setattr("xl2jax.checkpoint.params.jnp.asarray", lambda x: (sent.append(x.nbytes), put(x))[1])
    _, params = load_params(checkpoint, None, "int8")
    assert sum(sent) == sum(x.nbytes for x in flatten(params).values())


def test_a_damaged_one_is_refused(stored: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    copied = Path(shutil.copytree(stored, tmp_path / "copied"))
    raw = json.loads((copied / "xl2jax.json").read_text())
    checksums = raw["checksums"]
    for name in ("llm.layers.1.up.codes", "llm.layers.0.k.codes_scale", "llm.embed.codes"):
        changed = raw | {"checksums": checksums | {name: "0" * 32}}
        (copied / "xl2jax.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_params(copied)
    assert "is damaged" in refused(convert.main, copied, tmp_path / "out", "--reverse")
    for changes, message in (
        ({"weights": "int4"}, "do not fit config.json"),
        ({"weights": None}, "contradict each other"),
        ({"format": 2}, "contradict each other"),
        ({"weights": "int2"}, "weights"),
    ):
        (copied / "xl2jax.json").write_text(json.dumps(raw | changes))
        with pytest.raises(UserError, match=message):
            load_params(copied)


def test_flags_that_contradict(
    stored: Path, checkpoint: Path, clip: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    flags = ("--video", clip, "--question", "x", "--weights", "int4")
    assert refused(infer.main, *flags, "--checkpoint", stored).endswith(
        "its weights are int8 already: leave out --weights int4"
    )
    assert "int8 already" in refused(needle.main, "--checkpoint", stored, "--weights", "int4")
    assert load_params(stored, None, "int8")[0].llm.weights == "int8"
    assert "needs the PyTorch folder" in refused(convert.main, stored, tmp_path / "out", "--weights", "int8")
    with pytest.raises(UserError, match="weights must be int8, int4 or None, not 'int2'"):
        xl2jax.load(checkpoint, weights="int2")  # type: ignore[arg-type]
    assert "no effect with --reverse" in refused(
        convert.main, stored, tmp_path / "out", "--reverse", "--weights", "int8"
    )


@pytest.mark.parametrize(
    ("ends", "method"),
    [
        (("qweight", "qzeros", "g_idx"), "GPTQ"),
        (("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
        (("weight", "SCB"), "bitsandb"),
    ],
)
def test_checkpoints_that_others_quantised(ends: tuple[str, ...], method: str, copied: Path) -> None:
    tensors = load_file(copied / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[name]
    tensors |= {f"{name.removesuffix('weight')}{end}": np.zeros((2, 2), np.int32) for end in ends}
    save_file(tensors, copied / SINGLE)
    with pytest.raises(UserError, match=rf"format that is not read \({method}.* --weights int8 or int4"):
        load_params(copied)


def test_weights_that_are_not_finite(copied: Path) -> None:
    tensors = load_file(copied / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, copied / SINGLE)
    for weights in ("int8", "int4"):
        with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: has NaN or infinite numbers"):
            load_params(copied, None, weights)


@pytest.mark.slow
def test_the_bundled_model_answers_right(tmp_path: Path, command: Command) -> None:
    status, out, _ = command(demo_clip.main, tmp_path / "demo.mp4", "--seed", 1)
    assert status == 0
    pairs = [line.split("\t") for line in out.splitlines()]
    asked = [x for q, _ in pairs for x in ("--question", q)]
    status, out, err = command(
        infer.main, "--video", tmp_path / "demo.mp4", "--json", "--weights", "int8", "--cache-dtype", "int8", *asked
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["weights"] == "int8"
    assert [a["answer"] for a in report["answers"]] == [answer for _, answer in pairs]


def test_a_model_too_large_for_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read, and the message says what 8 bits would need."""
    config = PRESETS["tiny"]
    need = memory.weight_bytes(load_params(checkpoint)[0], "float32")
    small = memory.weight_bytes(load_params(checkpoint)[0].with_weights("int8"), "float32")
    assert config.llm.weights is None
    monkeypatch.setattr(memory, "available_bytes", lambda *_: (need + small) // 2)
    with pytest.raises(UserError, match=r"the model needs .* --weights int8 needs"):
        xl2jax.load(checkpoint)
    assert xl2jax.load(checkpoint, weights="int8").config.llm.weights == "int8"
    monkeypatch.setattr(memory, "available_bytes", lambda *_: small - 1)
    with pytest.raises(UserError, match=r"--weights int4 needs"):
        xl2jax.load(checkpoint)
    with pytest.raises(UserError, match=r"the model needs [^;]* are free$"):
        xl2jax.load(checkpoint, weights="int8")


def test_two_checkpoints_have_two_fingerprints(checkpoint: Path, model: xl2jax.Model) -> None:
    """So that a cache file of the one is not read with the other."""
    prints = {model.fingerprint, *(xl2jax.load(checkpoint, weights=w).fingerprint for w in ("int8", "int4"))}
    assert len(prints) == 3


def test_converting_back_reads_every_part(stored: Path, tmp_path: Path) -> None:
    orbax_to_torch(stored, tmp_path / "torch", None)
    expected = load_params(tmp_path / "torch", "float32")[1]
    _, params = load_params(stored, "float32")
    flat, whole = flatten(params), flatten(expected)
    codes, scale = flat["llm.layers.down.codes"].astype("float32"), flat["llm.layers.down.codes_scale"]
    assert np.array_equal((codes * scale[..., None]).swapaxes(-1, -2), whole["llm.layers.down.kernel"])
    assert np.array_equal(flat["llm.norm.scale"], whole["llm.norm.scale"])


@pytest.mark.slow
def test_numbers_that_float16_cannot_hold(copied: Path, tmp_path: Path) -> None:
    """Refused when quantising, and when a folder that bfloat16 could hold is loaded in float16."""
    tensors = load_file(copied / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, copied / SINGLE)
    kinds: tuple[Weights, ...] = ("int8", "int4")
    for weights in kinds:
        with pytest.raises(UserError, match=r"beyond 65504, which float16 cannot hold"):
            load_params(copied, "float16", weights)
        folder = tmp_path / weights
        torch_to_orbax(copied, folder, "bfloat16", weights)
        load_params(folder, "bfloat16")
        with pytest.raises(UserError, match=r"beyond 65504, which float16 cannot hold"):
            load_params(folder, "float16")


def test_sizes_that_4_bits_cannot_have() -> None:
    config = PRESETS["tiny"]
    odd = dataclasses.replace(config, llm=dataclasses.replace(config.llm, mlp_width=90))
    odd.with_weights("int8")
    with pytest.raises(UserError, match="not a multiple of 32"):
        odd.with_weights("int4")
