from __future__ import annotations

import errno
import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xl2jax.checkpoint import orbax_folder, safetensors_io
from xl2jax.checkpoint.convert import orbax_to_torch, torch_to_orbax
from xl2jax.checkpoint.params import load_params
from xl2jax.checkpoint.torch_folder import copy_companions, write_torch
from xl2jax.commands.convert import main
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.models.param_tree import flatten


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: x for f in folder.glob("*.safetensors") for k, x in load_file(f).items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        assert np.array_equal(x.view(np.uint8), b[name].view(np.uint8)), name


@pytest.mark.parametrize("case", ["tiny", "geometry"])
def test_converting_and_back_is_bit_equal(
    case: str, goldens: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    source = goldens / case / "checkpoint"
    assert command(main, source, tmp_path / "orbax")[0] == 0
    assert command(main, tmp_path / "orbax", tmp_path / "torch", "--reverse")[0] == 0
    assert_same(tensors_of(source), tensors_of(tmp_path / "torch"))
    assert VideoXL2Config.from_hf(tmp_path / "torch") == VideoXL2Config.from_hf(source)


def test_shards_bfloat16_and_unused_tensors(checkpoint: Path, tmp_path: Path) -> None:
    """Many shards, 16-bit tensors and tensors that upstream never uses survive both conversions."""
    config = VideoXL2Config.from_hf(checkpoint)
    whole = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors_of(checkpoint).items()}
    whole |= {
        "model.text_mlp.0.weight": np.ones((4, 4), ml_dtypes.bfloat16),
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight": np.ones(32, ml_dtypes.bfloat16),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": np.arange(25),
    }
    source = tmp_path / "shards"
    source.mkdir()
    copy_companions(checkpoint, source)
    names, weight_map = list(whole), {}
    for i in range(0, len(names), 10):
        file = f"model-{i:05d}.safetensors"
        save_file({k: whole[k] for k in names[i : i + 10]}, source / file)
        weight_map |= dict.fromkeys(names[i : i + 10], file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch_to_orbax(source, tmp_path / "orbax", None)
    orbax_to_torch(tmp_path / "orbax", tmp_path / "torch", None)
    assert_same(whole, tensors_of(tmp_path / "torch"))
    assert (tmp_path / "torch" / "tokenizer.json").is_file()

    # The same with small shards that this project writes.
    _, params = load_params(tmp_path / "orbax")
    flat = flatten(params)
    write_torch(
        tmp_path / "small",
        config,
        lambda e: np.asarray(flat[e.param] if e.layer is None else flat[e.param][e.layer]),
        "bfloat16",
        shard_bytes=100_000,
    )
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 3
    again = load_params(tmp_path / "small")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_dtype_is_chosen_or_kept(checkpoint: Path, tmp_path: Path) -> None:
    torch_to_orbax(checkpoint, tmp_path / "half", "bfloat16")
    assert {str(x.dtype) for x in flatten(load_params(tmp_path / "half")[1]).values()} == {"bfloat16"}
    assert {str(x.dtype) for x in flatten(load_params(tmp_path / "half", "float32")[1]).values()} == {"float32"}
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    copy_companions(checkpoint, mixed)
    tensors = tensors_of(checkpoint)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    save_file(tensors, mixed / "model.safetensors")
    with pytest.raises(UserError, match="stored as F16 and F32; choose --dtype"):
        torch_to_orbax(mixed, tmp_path / "out", None)


def assert_same_params(a: Any, b: Any) -> None:
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def test_orbax_and_torch_load_alike(checkpoint: Path, tmp_path: Path) -> None:
    torch_to_orbax(checkpoint, tmp_path / "orbax", None)
    assert_same_params(*(load_params(p)[1] for p in (checkpoint, tmp_path / "orbax")))


def test_converting_float16_and_back(
    checkpoint: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    assert command(main, checkpoint, tmp_path / "orbax", "--dtype", "float16")[0] == 0
    assert command(main, tmp_path / "orbax", tmp_path / "torch", "--reverse")[0] == 0
    assert json.loads((tmp_path / "torch" / "config.json").read_text())["torch_dtype"] == "float16"
    expected = {k: x.astype(np.float16) for k, x in tensors_of(checkpoint).items()}
    assert_same(expected, tensors_of(tmp_path / "torch"))
    assert_same_params(load_params(tmp_path / "torch")[1], load_params(checkpoint, "float16")[1])


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_one_line_names_all_problems_and_nothing_is_written(
    copied: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def damage(t: dict[str, np.ndarray]) -> None:
        del t["model.norm.weight"], t["model.sae.temporal_encoding"]
        t["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        t["model.mm_projector.0.weight"] = t["model.mm_projector.0.weight"].T.copy()
        t["model.layers.0.input_layernorm.weight"] = np.zeros(64, np.int32)

    edit(copied, damage)
    line = refused(main, copied, tmp_path / "out")
    assert "2 missing: model.sae.temporal_encoding, model.norm.weight" in line
    assert "1 unknown: model.layers.9.mlp.up_proj.weight" in line
    assert "1 misshapen: model.mm_projector.0.weight [32, 64] should be [64, 32]" in line
    assert "not floating point: model.layers.0.input_layernorm.weight is I32" in line
    assert list(tmp_path.glob("*out*")) == []


def test_duplicate(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    save_file({"model.norm.weight": np.ones(64, np.float32)}, copied / "more.safetensors")
    assert "stored twice: model.norm.weight" in refused(main, copied, tmp_path / "out")


def test_missing_shard(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing model-00002-of-00002.safetensors" in refused(main, copied, tmp_path / "out")


def test_a_wrong_index(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    index = {"weight_map": {"model.nothing.weight": "model.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "does not hold model.nothing.weight" in refused(main, copied, tmp_path / "out")


def test_truncated_file(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(main, copied, tmp_path / "out")


def test_a_wrong_header(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = copied / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"][1] += 4096
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    assert "not a whole safetensors file" in refused(main, copied, tmp_path / "out")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(name: str, copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (copied / "model.safetensors").rename(copied / name)
    line = refused(main, copied, tmp_path / "out")
    assert f"{name} is a pickle, which can run code" in line
    assert "safe_serialization" in line


def test_sources_and_targets(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no such checkpoint folder" in refused(main, tmp_path / "none", tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("kept")
    assert "already exists" in refused(main, copied, tmp_path / "there")
    assert (tmp_path / "there" / "kept").read_text() == "kept"
    assert "is not an Orbax checkpoint" in refused(main, copied, tmp_path / "out", "--reverse")
    (copied / "config.json").unlink()
    assert "config.json: no such file" in refused(main, copied, tmp_path / "out")


def test_a_tower_of_another_name_gets_the_common_one(copied: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    raw = json.loads((copied / "config.json").read_text())
    (copied / "vision_tower").rename(copied / "siglip")
    (copied / "config.json").write_text(json.dumps(raw | {"mm_vision_tower": "siglip"}))
    before = VideoXL2Config.from_hf(copied)
    assert command(main, copied, tmp_path / "deep" / "out")[0] == 0
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]
    assert VideoXL2Config.from_hf(tmp_path / "deep" / "out") == before
    assert (tmp_path / "deep" / "out" / "vision_tower").is_dir()


def test_target_below_a_file(copied: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(main, copied, tmp_path / "file" / "out")


def test_another_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert "not a Video-XL-2 checkpoint (model_type 'llama'" in refused(main, tmp_path, tmp_path / "out")


def test_too_little_disk_space(copied: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "MB, 0.0 MB are free there" in refused(main, copied, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("reverse", [False, True])
def test_a_disk_that_becomes_full(
    reverse: bool, checkpoint: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = checkpoint
    if reverse:
        torch_to_orbax(checkpoint, tmp_path / "source", None)
        source = tmp_path / "source"
        monkeypatch.setattr(safetensors_io.ShardWriter, "write", full)
    else:
        monkeypatch.setattr(orbax_folder.ocp.partial, "save", full)
    line = refused(main, source, tmp_path / "out", *(["--reverse"] if reverse else []))
    assert "no space left" in line
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_size_limit(
    reverse: bool, checkpoint: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """A limit of the system also affects Orbax's threads. The error is one line, without output from the threads."""
    source = checkpoint
    if reverse:
        torch_to_orbax(checkpoint, tmp_path / "source", None)
        source = tmp_path / "source"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        status, _, err = command(main, source, tmp_path / "out", *(["--reverse"] if reverse else []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2, err
    assert err.splitlines()[-1] == f"error: {tmp_path}/out: cannot be written (File too large)"
    assert "Traceback" not in err
    assert list(tmp_path.glob("*out*")) == []


def test_interrupted_run_leaves_nothing_and_can_be_repeated(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any, command: Callable[..., tuple[int, str, str]]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(orbax_folder.ocp.partial, "finalize", stop)
        assert command(main, checkpoint, tmp_path / "out")[0] == 130
    assert list(tmp_path.iterdir()) == []
    assert command(main, checkpoint, tmp_path / "out")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("reverse", [False, True])
def test_two_conversions_to_one_folder(
    reverse: bool, checkpoint: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two conversions overlap: one of them wins, and its result is complete."""
    source, flags, convert = checkpoint, (), torch_to_orbax
    owner, last = orbax_folder.OrbaxWriter, "finish"
    if reverse:
        torch_to_orbax(checkpoint, tmp_path / "source", None)
        source, flags, convert = tmp_path / "source", ("--reverse",), orbax_to_torch
        owner, last = safetensors_io.ShardWriter, "__exit__"
    ours = getattr(owner, last)

    def other_first(*args: Any) -> None:
        monkeypatch.setattr(owner, last, ours)
        convert(source, tmp_path / "out", None)
        ours(*args)

    monkeypatch.setattr(owner, last, other_first)
    assert (
        refused(main, source, tmp_path / "out", *flags)
        == f"{tmp_path}/out: already exists; choose another place or remove it first"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", *(["source"] if reverse else [])]
    assert_same_params(load_params(tmp_path / "out")[1], load_params(checkpoint)[1])
