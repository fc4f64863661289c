"""Where a checkpoint is: a folder, or a repository of the hub. What is something else is named."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from xl2jax.checkpoint.orbax_folder import MANIFEST, PARAMS
from xl2jax.checkpoint.safetensors_io import INDEX, PICKLED, SINGLE, refuse_pickles
from xl2jax.errors import UserError
from xl2jax.system.schema import unreadable

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.\-]*/[\w.\-]+)(?:@([\w.\-/]+))?")


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or that of a hub id, `org/name` or `org/name@revision`.

    A folder wins over a hub id of the same name. Raises UserError where there is neither, and where it is not a
    checkpoint but something that is often taken for one.
    """
    path, hub_id = Path(source), _HUB_ID.fullmatch(str(source))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        if hub_id is None:
            raise UserError(f"{source}: no such checkpoint folder") from None
        from xl2jax.checkpoint.hub import download

        path = download(hub_id[1], hub_id[2])
    except OSError as e:
        raise unreadable(path, e) from None
    else:
        if hub_id is not None and path.is_dir():
            logger.info("%s: the folder is read, not the hub's repository of that name", source)
    _refuse_others(path)
    return path


def _refuse_others(path: Path) -> None:
    """Raises UserError, with what to do, for what is known and no checkpoint."""
    if not path.is_dir():
        raise UserError(f"{path}: {_of_file(path.name)}")
    try:
        names = set(os.listdir(path))
    except OSError as e:
        raise unreadable(path, e) from None
    cached = re.fullmatch(r"models--(.+?)--(.+)", path.resolve().name)
    if cached is not None and "snapshots" in names:
        raise UserError(f"{path}: is a folder of the hub's cache: give the id {cached[1]}/{cached[2]} instead")
    if "adapter_config.json" in names and not names & {SINGLE, INDEX}:
        raise UserError(
            f"{path}: is an adapter (PEFT), not a whole model: merge it into its base model "
            "(model.merge_and_unload().save_pretrained(dir)) and give that folder"
        )
    if "config.json" in names:
        return
    if "checkpoints" in names and names & {"metrics.jsonl", "lengths.json"}:
        raise UserError(
            f"{path}: is the folder of a training run: run train.py again with --export DIR, and give that folder"
        )
    if path.name == PARAMS and (path.parent / MANIFEST).is_file():
        raise UserError(f"{path}: is a part of an Orbax checkpoint: give the folder {path.parent}")
    if any(name.endswith(".gguf") for name in names):
        raise UserError(f"{path}: {_of_file('.gguf')}")


def _of_file(name: str) -> str:
    suffix = Path(name).suffix or name
    if suffix == ".safetensors":
        return "is a file of weights: give the folder that it is in, with its config.json"
    if suffix == ".gguf":
        return "is a GGUF file, which cannot be read: give the model as its authors released it (safetensors)"
    if f"*{suffix}" in PICKLED:
        return refuse_pickles([name])
    return "is a file, not a checkpoint folder"
