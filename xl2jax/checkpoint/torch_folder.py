"""Reads and writes upstream's checkpoint layout: config.json, tokenizer files and safetensors shards."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from xl2jax.checkpoint.orbax_folder import is_orbax, unused_tensors
from xl2jax.checkpoint.param_names import Entry, entries, is_unused
from xl2jax.checkpoint.safetensors_io import (
    DTYPE_NAMES,
    DTYPES,
    FLOATS,
    INDEX,
    SINGLE,
    ShardWriter,
    Stored,
    TensorFolder,
)
from xl2jax.config import VISION_FOLDER, VideoXL2Config, foreign_weights, vision_config_path
from xl2jax.errors import UserError, listing
from xl2jax.models.param_tree import flatten
from xl2jax.system.atomic import replacing_folder
from xl2jax.system.schema import is_file, read_json
from xl2jax.system.terminal import byte_bar

_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "README.md",
)  # fmt: skip
_SHARD_BYTES = 4 << 30
_FOREIGN = {
    "GPTQ": ".g_idx", "GPTQ or AWQ": ".qweight", "bitsandbytes, 4 bits": ".absmax", "bitsandbytes, 8 bits": ".SCB",
    "compressed-tensors": ".weight_packed", "scaled 8 bits": ".weight_scale",
}  # fmt: skip
"""Formats of quantised weights, and how the name of one of their tensors ends. GPTQ has AWQ's names too."""


class TorchCheckpoint:
    """A folder in the PyTorch layout.

    Raises:
      UserError: the tensors do not fit config.json. The message lists all problems.
    """

    def __init__(self, folder: Path):
        self.config = VideoXL2Config.from_hf(folder)
        self.files = TensorFolder(folder)
        self.entries = entries(self.config)
        known = {e.torch_name: e for e in self.entries}
        shapes = self.files.shapes
        self.unused = [n for n in shapes if n not in known and is_unused(n, self.config)]
        for method, end in _FOREIGN.items():
            if any(n.endswith(end) for n in shapes):
                raise UserError(f"{folder}: {foreign_weights(method)}")
        unknown = [n for n in shapes if n not in known and not is_unused(n, self.config)]
        missing = [n for n in known if n not in shapes]
        misshapen = [
            f"{n} {list(shapes[n])} should be {list(e.torch_shape)}"
            for n, e in known.items()
            if n in shapes and shapes[n] != e.torch_shape
        ]
        odd = [f"{n} is {d}" for n, d in self.files.dtypes.items() if d not in DTYPES and n in self.unused]
        odd += [f"{n} is {d}" for n, d in self.files.dtypes.items() if d not in FLOATS and n in known]
        problems = [
            f"{len(names)} {what}: {listing(names)}"
            for what, names in (
                ("missing", missing),
                ("unknown", unknown),
                ("misshapen", misshapen),
                ("not floating point", odd),
            )
            if names
        ]
        if problems:
            raise UserError(f"{folder}: the weights do not fit config.json; " + "; ".join(problems))
        self.stored_dtypes = Counter(self.files.dtypes[n] for n in known)

    def dtype(self, wanted: str | None) -> str:
        """`wanted`, or by default the stored dtype. Raises UserError if tensors are stored in several dtypes."""
        if wanted is not None:
            return wanted
        stored = list(self.stored_dtypes)
        for name, code in DTYPE_NAMES.items():
            if stored == [code]:
                return name
        raise UserError(
            f"{self.files.folder}: stored as {' and '.join(sorted(stored))}; choose --dtype {', '.join(DTYPE_NAMES)}"
        )

    def read(self, parts: Sequence[Entry]) -> list[np.ndarray]:
        """Reads tensors in their stored dtype, in the layout of this model."""
        return [e.transform.to_jax(self.files.read(e.torch_name)) for e in parts]


def copy_companions(source: Path, target: Path) -> None:
    """Copies config.json, the vision tower's config and the tokenizer files to the folder `target`."""
    for name in ("config.json", *_COMPANIONS):
        if is_file(source / name):
            shutil.copyfile(source / name, target / name)
    raw = read_json(source / "config.json", dict[str, Any])
    tower = vision_config_path(source, str(raw["mm_vision_tower"]))
    if tower is not None:
        (target / VISION_FOLDER).mkdir()
        shutil.copyfile(tower, target / VISION_FOLDER / "config.json")
        if raw["mm_vision_tower"] != VISION_FOLDER:
            _write_json(target / "config.json", raw | {"mm_vision_tower": VISION_FOLDER})


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
    """Writes upstream's layout: config.json, safetensors shards, and an index if there are several shards.

    Args:
      target: the folder to create.
      config: the sizes of the model.
      read: gives the array of one tensor in this model's layout and in `dtype`.
      dtype: `float32`, `bfloat16` or `float16`.
      companions: a checkpoint folder in either layout, from which config, tokenizer files and unused tensors are
        copied. Without it config.json is written from `config`, and there is no tokenizer.
      shard_bytes: largest size of a shard, unless a single tensor is larger.
      progress: whether a progress bar is shown.

    Raises:
      UserError: `target` exists or cannot be written.
    """
    code = DTYPE_NAMES[dtype]
    items: list[tuple[Stored, Callable[[], np.ndarray]]] = []
    for e in entries(config):
        items.append(((e.torch_name, e.torch_shape, code), functools.partial(_as_torch, read, e, config)))
    unused, names = _unused_of(companions)
    for n in names:
        items.append(((n, unused.shapes[n], unused.dtypes[n]), functools.partial(unused.read, n)))
    sizes = [math.prod(s) * DTYPES[d].itemsize for (_, s, d), _ in items]
    shards: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(sizes):
        if used and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(i)
        used += size
    with replacing_folder(target, sum(sizes)) as folder, byte_bar("write", sum(sizes), progress) as bar:
        if companions is not None:
            copy_companions(companions, folder)
        else:
            _write_configs(config, folder)
        _set_torch_dtype(folder / "config.json", dtype)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with ShardWriter(folder / name, [items[i][0] for i in shard]) as out:
                for i in shard:
                    stored, tensor = items[i]
                    out.write(stored[0], tensor())
                    weight_map[stored[0]] = name
                    bar.update(sizes[i])
        if len(shards) > 1:
            _write_json(
                folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
            )


def write_params(target: Path, config: VideoXL2Config, params: nnx.State, *, companions: Path) -> None:
    """Writes float32 parameters in upstream's layout, with config and tokenizer of the checkpoint `companions`."""
    stored = {name: np.asarray(x) for name, x in flatten(params).items()}

    def read(entry: Entry) -> np.ndarray:
        return stored[entry.param] if entry.layer is None else stored[entry.param][entry.layer]

    write_torch(target, config, read, "float32", companions=companions)


def _unused_of(companions: Path | None) -> tuple[TensorFolder, list[str]]:
    """The files and names of the tensors of a checkpoint in either layout that upstream stores but never uses."""
    if companions is None:
        return TensorFolder(Path(), []), []
    if is_orbax(companions):
        unused = unused_tensors(companions)
        return unused, list(unused.shapes)
    torch = TorchCheckpoint(companions)
    return torch.files, torch.unused


def _as_torch(read: Callable[[Entry], np.ndarray], entry: Entry, config: VideoXL2Config) -> np.ndarray:
    return entry.transform.to_torch(read(entry), config)


def _write_configs(config: VideoXL2Config, folder: Path) -> None:
    llm, vision = config.to_hf()
    (folder / VISION_FOLDER).mkdir()
    _write_json(folder / "config.json", llm)
    _write_json(folder / VISION_FOLDER / "config.json", vision)


def _set_torch_dtype(path: Path, dtype: str) -> None:
    raw = read_json(path, dict[str, Any])
    key = "dtype" if "dtype" in raw else "torch_dtype"
    if raw.get(key) != dtype:
        _write_json(path, raw | {key: dtype})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
