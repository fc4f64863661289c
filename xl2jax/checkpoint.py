"""Model checkpoints: PyTorch folders, Orbax folders and hub ids in; Orbax and PyTorch folders out.

An Orbax model folder holds

    config.json, vision_tower/config.json    upstream's own
    tokenizer.json, ...                      upstream's own
    params/                                  the Orbax checkpoint, one array per tensor of a layer
    unused.safetensors                       tensors that upstream stores and never reads
    xl2jax.json                              {"format": 1, "dtype": "bfloat16"}
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx, traverse_util

from xl2jax.config import VISION_FOLDER, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.names import Entry, entries, flatten, is_unused, unflatten
from xl2jax.tensor_files import (
    DTYPES,
    FLOATS,
    INDEX,
    SINGLE,
    ShardWriter,
    Stored,
    TensorFolder,
    listing,
    refuse_pickles,
)
from xl2jax.terminal import byte_bar

PARAMS, UNUSED, MANIFEST = "params", "unused.safetensors", "xl2jax.json"
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "README.md",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_BATCH_BYTES = 64 << 20  # arrays handed to Orbax at a time
_SHARD_BYTES = 4 << 30


# --- where a checkpoint is ------------------------------------------------------------------


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or a hub id downloaded through huggingface_hub."""
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        if not path.is_dir():
            raise UserError(f"{source}: no such checkpoint folder")
        return path
    from huggingface_hub import list_repo_files, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", f"{VISION_FOLDER}/*"]
    try:
        files = list_repo_files(str(source))
        pickled = [f for f in files if f.endswith((".bin", ".pt", ".pth"))]
        if pickled and not any(f.endswith(".safetensors") for f in files):
            raise UserError(f"{source}: {refuse_pickles(pickled)}")
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except UserError:
        raise
    except Exception as e:  # huggingface_hub raises many unrelated types (HTTP, OS, its own)
        raise UserError(f"{source}: no such folder, and the hub download failed ({_first_line(e)})") from None


def is_orbax(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


# --- reading --------------------------------------------------------------------------------


class TorchCheckpoint:
    """A PyTorch-layout folder checked against its config: every problem found is in one error."""

    def __init__(self, folder: Path):
        self.config = VideoXL2Config.from_hf(folder)
        self.files = TensorFolder(folder)
        self.entries = entries(self.config)
        known = {e.torch_name: e for e in self.entries}
        found = self.files.shapes
        self.unused = [n for n in found if n not in known and is_unused(n, self.config)]
        unknown = [n for n in found if n not in known and not is_unused(n, self.config)]
        missing = [n for n in known if n not in found]
        misshapen = [
            f"{n} {list(found[n])} should be {list(e.torch_shape)}"
            for n, e in known.items()
            if n in found and found[n] != e.torch_shape
        ]
        odd = [f"{n} is {d}" for n, d in self.files.dtypes.items() if d not in DTYPES and n in self.unused]
        odd += [f"{n} is {d}" for n, d in self.files.dtypes.items() if d not in FLOATS and n in known]
        problems = [
            f"{len(names)} {what}: {listing(names)}"
            for what, names in (
                ("missing", missing), ("unknown", unknown), ("misshapen", misshapen), ("not floating point", odd),
            )
            if names
        ]  # fmt: skip
        if problems:
            raise UserError(f"{folder}: the weights do not fit config.json; " + "; ".join(problems))
        self.stored_dtypes = Counter(self.files.dtypes[n] for n in known)

    def dtype(self, wanted: str | None) -> str:
        """`wanted`, or the one dtype that all tensors are stored in."""
        if wanted is not None:
            return wanted
        stored = list(self.stored_dtypes)
        for name, code in DTYPE_NAMES.items():
            if stored == [code]:
                return name
        raise UserError(
            f"{self.files.folder}: stored as {' and '.join(sorted(stored))}; choose --dtype bfloat16 or float32"
        )

    def read(self, entry: Entry, dtype: str) -> np.ndarray:
        array = self.files.read(entry.torch_name)
        return np.ascontiguousarray(entry.transform.to_jax(array)).astype(DTYPES[DTYPE_NAMES[dtype]], copy=False)


def load_params(folder: Path, dtype: str | None = None, *, progress: bool = False) -> tuple[VideoXL2Config, nnx.State]:
    """Parameters from either layout, layers stacked, on the default device. See `read_params`."""
    config = VideoXL2Config.from_hf(folder)
    params = {name: jnp.asarray(array) for name, array in read_params(folder, dtype, progress=progress)}
    return config, unflatten(params, config)


class ParamReader:
    """The parameters of a checkpoint of either layout by dotted name, layers stacked: opened and checked once.

    `dtype`: `float32`, `bfloat16`, or None for the stored one. Host memory holds one stacked parameter and its
    layers at a time.
    """

    def __init__(self, folder: Path, dtype: str | None = None):
        if is_orbax(folder):
            config = VideoXL2Config.from_hf(folder)
            chosen = dtype or read_manifest(folder)["dtype"]
            self._source = _orbax_reader(folder, config)
            table = entries(config)
        else:
            torch = TorchCheckpoint(folder)
            chosen, table = torch.dtype(dtype), torch.entries
            self._source = lambda parts: [torch.read(entry, chosen) for entry in parts]
        self._target = DTYPES[DTYPE_NAMES[chosen]]
        self._parts: dict[str, list[Entry]] = {}
        for entry in table:
            self._parts.setdefault(entry.param, []).append(entry)

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def nbytes(self, name: str) -> int:
        return sum(int(np.prod(e.shape)) for e in self._parts[name]) * self._target.itemsize

    def read(self, name: str) -> np.ndarray:
        parts = self._parts[name]
        arrays = [a.astype(self._target, copy=False) for a in self._source(parts)]
        return arrays[0] if parts[0].layer is None else np.stack(arrays)


def read_params(
    folder: Path, dtype: str | None = None, *, progress: bool = False, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, np.ndarray]]:
    """(dotted name, array) of the wanted parameters. See `ParamReader`."""
    reader = ParamReader(folder, dtype)
    names = [n for n in reader.names if wanted(n)]
    with byte_bar("load", sum(map(reader.nbytes, names)), progress) as bar:
        for name in names:
            array = reader.read(name)
            yield name, array
            bar.update(array.nbytes)


def _orbax_reader(folder: Path, config: VideoXL2Config) -> Callable[[list[Entry]], list[np.ndarray]]:
    """Reads chosen tensors of an Orbax folder, after checking all names and shapes."""
    path = (folder / PARAMS).absolute()
    try:
        metadata = ocp.pytree_metadata(path).metadata
    except Exception as e:  # Orbax raises what its storage raises
        raise UserError(f"{path}: not a whole Orbax checkpoint ({_first_line(e)}); convert it again") from None
    stored = traverse_util.flatten_dict(metadata, sep=".")
    wanted = {e.name: e for e in entries(config)}
    problems = [n for n in stored if n not in wanted] + [
        n for n, e in wanted.items() if n not in stored or tuple(stored[n].shape) != e.shape
    ]
    if problems:
        raise UserError(f"{path}: the arrays do not fit config.json: {listing(problems)}")

    def read(parts: list[Entry]) -> list[np.ndarray]:
        abstract: dict[str, Any] = dict.fromkeys(stored, ocp.PLACEHOLDER)
        for e in parts:
            abstract[e.name] = np.empty(e.shape, stored[e.name].dtype)
        try:
            tree = ocp.load_pytree(path, traverse_util.unflatten_dict(abstract, sep="."))
        except Exception as e:
            raise UserError(f"{path}: cannot be read ({_first_line(e)}); convert it again") from None
        flat = traverse_util.flatten_dict(tree, sep=".")
        return [flat[e.name] for e in parts]

    return read


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != 1 or manifest["dtype"] not in DTYPE_NAMES:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / MANIFEST}: not a manifest that this version reads") from None
    return manifest


# --- writing --------------------------------------------------------------------------------


@contextlib.contextmanager
def written_beside(target: Path, need_bytes: int) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, else vanishes.

    Raises UserError if `target` exists, or the disk is too small or runs full.
    """
    if target.exists():
        raise UserError(f"{target}: already exists; choose another place or remove it first")
    beside = target.parent / f".{target.name}.incomplete-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes:
            raise UserError(f"{target}: needs {need_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
        _remove_leftovers(target)
        beside.mkdir()
        yield beside
        os.replace(beside, target)
    except BaseException as e:
        shutil.rmtree(beside, ignore_errors=True)
        if (isinstance(e, OSError) and e.errno == errno.ENOSPC) or "No space left on device" in str(e):
            raise UserError(f"{target}: no space left on the disk; nothing was kept") from None
        if isinstance(e, OSError):
            raise UserError(f"{target}: cannot be written ({e.strerror})") from None
        raise


def _remove_leftovers(target: Path) -> None:
    """Removes what runs that were killed left beside `target`; a running one is let be."""
    for folder in target.parent.glob(f".{target.name}.incomplete-*"):
        try:
            os.kill(int(folder.name.rpartition("-")[2]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # somebody else's running process


def copy_companions(source: Path, target: Path) -> None:
    """config.json, the vision tower's config and the tokenizer files."""
    for name in ("config.json", *_COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    raw = json.loads((source / "config.json").read_text())
    tower = source / str(raw["mm_vision_tower"]) / "config.json"
    if tower.is_file():
        (target / VISION_FOLDER).mkdir()
        shutil.copyfile(tower, target / VISION_FOLDER / "config.json")
        if raw["mm_vision_tower"] != VISION_FOLDER:  # a name that leads elsewhere means nothing here
            raw["mm_vision_tower"] = VISION_FOLDER
            (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def torch_to_orbax(source: Path, target: Path, dtype: str | None, *, progress: bool = False) -> None:
    """Converts a PyTorch-layout folder; peak memory is a few tensors."""
    torch = TorchCheckpoint(source)
    chosen = torch.dtype(dtype)
    itemsize = DTYPES[DTYPE_NAMES[chosen]].itemsize
    total = sum(int(np.prod(e.shape)) for e in torch.entries) * itemsize
    kept = sum(torch.files.nbytes(n) for n in torch.unused)
    with written_beside(target, total + kept) as place, byte_bar("convert", total, progress) as bar:
        copy_companions(source, place)
        _write_unused(torch, place / UNUSED)
        (place / MANIFEST).write_text(json.dumps({"format": 1, "dtype": chosen}) + "\n")
        path = (place / PARAMS).absolute()
        batch: dict[str, np.ndarray] = {}
        size = 0
        for entry in torch.entries:
            batch[entry.name] = torch.read(entry, chosen)
            size += batch[entry.name].nbytes
            if size >= _BATCH_BYTES or entry is torch.entries[-1]:
                ocp.partial.save(path, traverse_util.unflatten_dict(batch, sep="."))
                bar.update(size)
                batch, size = {}, 0
        ocp.partial.finalize(path)


def _write_unused(torch: TorchCheckpoint, path: Path) -> None:
    names = torch.unused
    if names:
        with ShardWriter(path, [(n, torch.files.shapes[n], torch.files.dtypes[n]) for n in names]) as out:
            for name in names:
                out.write(name, torch.files.read(name))


def orbax_to_torch(source: Path, target: Path, dtype: str | None, *, progress: bool = False) -> None:
    """Converts an Orbax model folder back to sharded safetensors, a tensor at a time."""
    config = VideoXL2Config.from_hf(source)
    stored = read_manifest(source)["dtype"]
    chosen = dtype or stored
    reader = _orbax_reader(source, config)

    def read(entry: Entry) -> np.ndarray:
        return reader([entry])[0].astype(DTYPES[DTYPE_NAMES[chosen]], copy=False)

    write_torch(target, config, read, chosen, companions=source, progress=progress)


def write_torch(
    target: Path,
    config: VideoXL2Config,
    read: Callable[[Entry], np.ndarray],
    dtype: str,
    *,
    companions: Path | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes upstream's layout: config.json, safetensors shards, an index when there are several.

    `read(entry)` gives our array of one tensor in `dtype`. `companions` is the checkpoint folder (either layout)
    that config, tokenizer files and unused tensors are copied from; without it config.json is made from `config`.
    """
    code = DTYPE_NAMES[dtype]
    items: list[tuple[Stored, Callable[[], np.ndarray]]] = []
    for e in entries(config):
        items.append(((e.torch_name, e.torch_shape, code), functools.partial(_as_torch, read, e, config)))
    kept, names = _unused_of(companions)
    for n in names:
        items.append(((n, kept.shapes[n], kept.dtypes[n]), functools.partial(kept.read, n)))
    sizes = [int(np.prod(s, dtype=np.int64)) * DTYPES[d].itemsize for (_, s, d), _ in items]
    shards: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(sizes):
        if used and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(i)
        used += size
    with written_beside(target, sum(sizes)) as place, byte_bar("write", sum(sizes), progress) as bar:
        if companions is not None:
            copy_companions(companions, place)
        else:
            _write_configs(config, place)
        _set_torch_dtype(place / "config.json", dtype)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with ShardWriter(place / name, [items[i][0] for i in shard]) as out:
                for i in shard:
                    stored, tensor = items[i]
                    out.write(stored[0], tensor())
                    weight_map[stored[0]] = name
                    bar.update(sizes[i])
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
            (place / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_params(target: Path, config: VideoXL2Config, params: nnx.State, *, companions: Path) -> None:
    """Float32 parameters in memory as upstream's layout, with the companions of the checkpoint they came from."""
    stored = {name: np.asarray(x) for name, x in flatten(params).items()}

    def read(entry: Entry) -> np.ndarray:
        return stored[entry.param] if entry.layer is None else stored[entry.param][entry.layer]

    write_torch(target, config, read, "float32", companions=companions)


def _unused_of(companions: Path | None) -> tuple[TensorFolder, list[str]]:
    """The tensors of a checkpoint that upstream stores and never reads, in either layout."""
    if companions is not None and (companions / UNUSED).is_file():
        kept = TensorFolder(companions, [companions / UNUSED])
        return kept, list(kept.shapes)
    if companions is None or is_orbax(companions):
        return TensorFolder(Path(), []), []
    torch = TorchCheckpoint(companions)
    return torch.files, torch.unused


def _as_torch(read: Callable[[Entry], np.ndarray], entry: Entry, config: VideoXL2Config) -> np.ndarray:
    return entry.transform.to_torch(read(entry), config)


def _write_configs(config: VideoXL2Config, place: Path) -> None:
    llm, vision = config.to_hf()
    (place / VISION_FOLDER).mkdir()
    (place / "config.json").write_text(json.dumps(llm, indent=2) + "\n")
    (place / VISION_FOLDER / "config.json").write_text(json.dumps(vision, indent=2) + "\n")


def _set_torch_dtype(path: Path, dtype: str) -> None:
    raw = json.loads(path.read_text())
    key = "dtype" if "dtype" in raw else "torch_dtype"
    if raw.get(key) != dtype:
        raw[key] = dtype
        path.write_text(json.dumps(raw, indent=2) + "\n")
