"""Tensors are read as they were written, or the checkpoint is refused with one line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from damage import damaged, damaged_json, outcome
from safetensors.numpy import load_file, save_file

from xl2jax.checkpoint import convert
from xl2jax.checkpoint.convert import orbax_to_torch, torch_to_orbax
from xl2jax.checkpoint.orbax_folder import OrbaxFolder, read_manifest
from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.params import ParamReader, load_params
from xl2jax.checkpoint.safetensors_io import INDEX, SINGLE, TensorFolder
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.checkpoint.torch_folder import TorchCheckpoint
from xl2jax.commands.convert import main
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.prompt import PromptTokenizer

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def orbax(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an Orbax folder, with a tensor that upstream never uses. Tests must not change it."""
    source, target = (tmp_path_factory.mktemp("orbax") / name for name in ("torch", "orbax"))
    shutil.copytree(checkpoint, source)
    save_file({"model.text_mlp.0.weight": np.arange(12.0).reshape(3, 4)}, source / "unused.safetensors")
    edit(source, lambda t: t.update({"model.text_mlp.0.weight": np.arange(12, dtype=np.float32)}))
    (source / "unused.safetensors").unlink()
    torch_to_orbax(source, target, None)
    return target


@pytest.fixture
def copied_orbax(orbax: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(orbax, tmp_path / "orbax"))


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def orbax_tensors(folder: Path, *, verify: bool = True) -> dict[str, np.ndarray]:
    reader = OrbaxFolder(folder, VideoXL2Config.from_hf(folder), verify=verify)
    tensors = {e.name: reader.read([e])[0] for e in reader.tensors}
    reader.verify_unused()
    return tensors


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(x.tobytes() == b[n].tobytes() for n, x in a.items())


# --- checksums of Orbax folders -------------------------------------------------------------


def weights(folder: Path) -> Path:
    """The file with nearly all of the weights."""
    return max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size)


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_of_the_weights_is_noticed(orbax: Path, copied_orbax: Path) -> None:
    whole, path = orbax_tensors(orbax), weights(copied_orbax)
    original, rng = path.read_bytes(), random.Random(0)
    refusals = 0
    for _ in range(12):
        flip(path, rng.randrange(len(original)), rng.randrange(8))
        tensors, line = outcome(lambda: orbax_tensors(copied_orbax))
        assert tensors is None or same(tensors, whole)
        assert tensors is not None or "convert" in line
        refusals += tensors is None
        path.write_bytes(original)
    assert refusals >= 10


def test_the_damaged_tensor_is_named_and_the_flag_skips_the_check(
    copied_orbax: Path, tmp_path: Path, refused: Callable[..., str], command: Callable[..., tuple[int, str, str]]
) -> None:
    manifest = copied_orbax / "xl2jax.json"
    raw = json.loads(manifest.read_text())
    name = "llm.layers.1.up.kernel"
    raw["checksums"][name] = raw["checksums"]["llm.layers.0.up.kernel"]
    manifest.write_text(json.dumps(raw))
    expected = f"{copied_orbax}: {name} is damaged (its checksum differs); convert the checkpoint again"
    with pytest.raises(UserError) as e:
        load_params(copied_orbax)
    assert str(e.value) == expected
    load_params(copied_orbax, verify=False)
    assert refused(main, copied_orbax, tmp_path / "out", "--reverse") == expected
    assert not (tmp_path / "out").exists()
    assert command(main, copied_orbax, tmp_path / "out", "--reverse", "--no-verify-checksums")[0] == 0
    torch = tmp_path / "out"
    assert "has no effect without --reverse" in refused(main, torch, tmp_path / "again", "--no-verify-checksums")


def test_unused_tensors_are_checked_when_they_are_copied(copied_orbax: Path, tmp_path: Path) -> None:
    flip(copied_orbax / "unused.safetensors", -1)
    load_params(copied_orbax)
    with pytest.raises(UserError, match="model.text_mlp.0.weight is damaged"):
        orbax_to_torch(copied_orbax, tmp_path / "out", None)


def test_folders_of_an_earlier_version(copied_orbax: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = copied_orbax / "xl2jax.json"
    manifest.write_text('{"format": 1, "dtype": "float32"}')
    with caplog.at_level("INFO"):
        orbax_to_torch(copied_orbax, tmp_path / "out", None)
    assert [r.getMessage() for r in caplog.records if "no checksums" in r.getMessage()] == [
        f"{copied_orbax}: has no checksums because an earlier version converted it, so damage is not noticed: "
        "convert it again to add them"
    ]
    manifest.write_text('{"format": 2, "dtype": "float32"}')
    with pytest.raises(UserError, match="checksums: is missing"):
        load_params(copied_orbax)
    manifest.write_text('{"format": 4, "dtype": "float32"}')
    with pytest.raises(UserError, match="format: should be 1, 2 or 3, not 4"):
        load_params(copied_orbax)


def test_incomplete_orbax_folders(copied_orbax: Path, orbax: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error is one line, without tracebacks from threads of Orbax."""
    params = copied_orbax / "params"
    for damage in (
        lambda: [p.unlink() for p in params.rglob("_METADATA")],
        lambda: weights(copied_orbax).write_bytes(weights(copied_orbax).read_bytes()[:100_000]),
        lambda: [p.write_bytes(b"") for p in params.rglob("manifest.ocdbt")],
        lambda: [p.write_text("[" * 100_000) for p in params.rglob("_METADATA")],
        lambda: shutil.rmtree(params),
    ):
        damage()
        with pytest.raises(UserError, match="convert it again"):
            load_params(copied_orbax)
        shutil.rmtree(copied_orbax)
        shutil.copytree(orbax, copied_orbax)
    os.mkfifo(params / "pipe")
    with pytest.raises(UserError, match="is a pipe or a device"):
        load_params(copied_orbax)
    assert "Traceback" not in capfd.readouterr().err


def test_fuzzed_orbax_folders(orbax: Path, copied_orbax: Path) -> None:
    whole = orbax_tensors(orbax)
    files = [p.relative_to(orbax) for folder in ("params", ".") for p in sorted((orbax / folder).glob("**/*"))]
    files = [f for f in files if (orbax / f).is_file() and (f.parts[0] in ("params", "xl2jax.json"))]
    for seed in range(16):
        rng = random.Random(seed)
        path = copied_orbax / rng.choice(files)
        data = path.read_bytes()
        path.write_bytes(damaged(data, rng) if data else b"x")
        tensors, _ = outcome(lambda: orbax_tensors(copied_orbax))
        assert tensors is None or same(tensors, whole)
        path.write_bytes(data)


def test_fuzzed_manifests(orbax: Path, copied_orbax: Path) -> None:
    """A damaged manifest that is accepted has at most other digits in its checksums, which then fit no tensor."""
    text, whole = (orbax / "xl2jax.json").read_bytes(), read_manifest(orbax)
    for seed in range(200):
        (copied_orbax / "xl2jax.json").write_bytes(damaged_json(text, random.Random(seed)))
        manifest, _ = outcome(lambda: read_manifest(copied_orbax))
        assert manifest is None or manifest.dtype == whole.dtype
        assert manifest is None or manifest.format == 1 or manifest.checksums is not None


# --- files without permission ----------------------------------------------------------------


@contextlib.contextmanager
def denied(path: Path) -> Iterator[None]:
    """Removes the permission to read a path. The superuser becomes another user in the meantime."""
    user, mode = os.geteuid(), path.stat().st_mode
    path.chmod(0)
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.mark.parametrize(
    "name",
    [
        "torch", "torch/config.json", "torch/model.safetensors", "torch/tokenizer.json", "torch/vision_tower",
        "orbax", "orbax/xl2jax.json", "orbax/params", "orbax/params/state", "orbax/params/state/_METADATA",
    ],
)  # fmt: skip
def test_files_without_permission(name: str, checkpoint: Path, orbax: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:  # other users cannot enter pytest's folders
        for source, target in ((checkpoint, "torch"), (orbax, "orbax")):
            shutil.copytree(source, Path(scratch, target))
        subprocess.run(["chmod", "-R", "a+rX", scratch], check=True)
        folder = Path(scratch, name.partition("/")[0])

        def load() -> None:
            find_checkpoint(folder)
            PromptTokenizer.load(folder, 1000)
            ParamReader(folder)

        load()
        with denied(Path(scratch, name)), pytest.raises(UserError, match=f"^{scratch}/{name}.*: no permission to read"):
            load()


# --- finite numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(bad: float, copied: Path, tmp_path: Path) -> None:
    def damage(t: dict[str, np.ndarray]) -> None:
        t[NAME][-1, -1] = bad

    torch_to_orbax(copied, tmp_path / "orbax", None)
    edit(copied, damage)
    for call in (lambda: load_params(copied), lambda: torch_to_orbax(copied, tmp_path / "out", "bfloat16")):
        with pytest.raises(UserError, match=f"{NAME}: has NaN or infinite numbers"):
            call()
    assert not (tmp_path / "out").exists()


def test_orbax_weights_must_be_finite(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that an earlier version would have converted are refused, also without checksums."""
    read = TorchCheckpoint.read

    def damage(self: TorchCheckpoint, parts: Sequence[Entry]) -> list[np.ndarray]:
        arrays = zip(parts, read(self, parts), strict=True)
        return [np.full_like(array, np.nan) if e.torch_name == NAME else array for e, array in arrays]

    with monkeypatch.context() as earlier:
        earlier.setattr(TorchCheckpoint, "read", damage)
        earlier.setattr(convert, "cast", lambda array, dtype, where: np.ascontiguousarray(array))
        torch_to_orbax(checkpoint, tmp_path / "orbax", None)
    for call in (
        lambda: load_params(tmp_path / "orbax"),
        lambda: load_params(tmp_path / "orbax", verify=False),
        lambda: orbax_to_torch(tmp_path / "orbax", tmp_path / "out", None),
    ):
        with pytest.raises(UserError, match="llm.layers.1.up.kernel: has NaN or infinite numbers"):
            call()


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_numbers_that_float16_cannot_hold(stored: type, copied: Path, tmp_path: Path) -> None:
    def damage(t: dict[str, np.ndarray]) -> None:
        t.update({n: x.astype(stored) for n, x in t.items()})
        t[NAME][3, 3] = 70_000

    edit(copied, damage)
    torch_to_orbax(copied, tmp_path / "orbax", None)
    for folder, name in ((copied, NAME), (tmp_path / "orbax", "llm.layers.1.up.kernel")):
        with pytest.raises(UserError, match=f"{name}: has numbers beyond 65504, which float16 cannot hold"):
            load_params(folder, "float16")
    for call, source in ((torch_to_orbax, copied), (orbax_to_torch, tmp_path / "orbax")):
        with pytest.raises(UserError, match="which float16 cannot hold: choose bfloat16 or float32"):
            call(source, tmp_path / "out", "float16")
    largest = 65_504 if stored is np.float32 else 65_280
    edit(copied, lambda t: t[NAME].__setitem__((3, 3), largest))
    assert ParamReader(copied, "float16").read("llm.layers.up.kernel")[1, 3, 3] == largest


# --- safetensors folders ---------------------------------------------------------------------


def shard(folder: Path, names: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("name", ["../{0}", "{1}/{0}", "below/../../{0}", "..", "", "a\nb", "x" * 5000])
def test_shards_outside_the_folder(name: str, copied: Path, tmp_path: Path) -> None:
    names = dict.fromkeys(load_file(copied / SINGLE), name.format(SINGLE, tmp_path))
    shutil.move(copied / SINGLE, tmp_path / SINGLE)
    shard(copied, names)
    with pytest.raises(UserError, match="leads out of the folder|is empty|is too long") as e:
        load_params(copied)
    assert len(str(e.value)) < 700


def test_shards_in_folders_and_behind_links(copied: Path, tmp_path: Path) -> None:
    """In the hub's cache each file is a link to a blob in another folder."""
    before = load_params(copied)[1]
    (copied / "below").mkdir()
    shutil.move(copied / SINGLE, tmp_path / "blob")
    (copied / "below" / SINGLE).symlink_to("../../blob")
    shard(copied, dict.fromkeys(load_file(tmp_path / "blob"), f"below/{SINGLE}"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, load_params(copied)[1]))


@pytest.mark.parametrize("name", [SINGLE, INDEX, "shard.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_irregular_files_are_refused_without_blocking(
    name: str, kind: str, copied: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = copied / name
    if name == "shard.safetensors":
        shard(copied, dict.fromkeys(load_file(copied / SINGLE), name))
    path.unlink(missing_ok=True)
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    line = refused(main, copied, tmp_path / "out")
    assert line == f"{path}: is {'a folder' if kind == 'folder' else 'a pipe or a device'}, not a regular file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "weight_map: is missing"),
        ('{"weight_map": []}', "weight_map: should be an object"),
        ('{"weight_map": {"a": 1}}', "weight_map.a: should be a valid string, not 1"),
        ('{"weight_map": {"a": ["x"]}}', "weight_map.a: should be a valid string"),
        ("[" * 100_000, "not JSON"),
        ('{"weight_map": {"%s": "model.safetensors"}}' % ("n" * 5000), "does not hold nnn"),
    ],
)
def test_indices_that_cannot_be_used(text: str, message: str, copied: Path) -> None:
    (copied / INDEX).write_text(text)
    with pytest.raises(UserError, match=message) as e:
        TensorFolder(copied)
    assert len(str(e.value)) < 500


def test_sizes_beyond_any_integer(copied: Path) -> None:
    """An empty tensor may state any other size, because it takes no bytes."""
    raw = (copied / SINGLE).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["model.text_mlp.0.weight"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (copied / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    reader, _ = outcome(lambda: TorchCheckpoint(copied))
    assert reader is None or reader.files.nbytes("model.text_mlp.0.weight") == 0


def test_fuzzed_indices(copied: Path) -> None:
    names = list(load_file(copied / SINGLE))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names[:20], SINGLE)}).encode()
    expected = TensorFolder(copied).shapes
    for seed in range(100):
        (copied / INDEX).write_bytes(damaged_json(text, random.Random(seed)))
        folder, _ = outcome(lambda: TensorFolder(copied))
        assert folder is None or folder.shapes == expected


def test_fuzzed_safetensors(copied: Path) -> None:
    """The header is checked against config.json and the file's length; safetensors has no checksum of the data."""
    raw = (copied / SINGLE).read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    reader = TorchCheckpoint(copied)
    expected = {e.torch_name: reader.files.read(e.torch_name).tobytes() for e in reader.entries}
    for seed in range(100):
        rng = random.Random(seed)
        head = damaged(raw[:size], rng)
        (copied / SINGLE).write_bytes(head + raw[size:] if rng.random() < 0.8 else damaged(raw, rng))
        reader, _ = outcome(lambda: TorchCheckpoint(copied))
        if reader is not None:
            values = {n: outcome(lambda n=n, reader=reader: reader.files.read(n))[0] for n in list(expected)[:4]}
            assert all(x is None or x.nbytes == len(expected[n]) for n, x in values.items())
