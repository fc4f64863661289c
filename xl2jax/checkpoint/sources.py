"""Finds a checkpoint, which is a folder or a repository on the hub, and names common mistakes."""

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
    """The folder of a checkpoint. `source` is a folder or a hub id, `org/name` or `org/name@revision`.

    If both a folder and a hub id match, the folder is used.

    Raises:
      UserError: neither exists, or the folder is something else that is often confused with a checkpoint.
    """
    path, hub_id = Path(source), _HUB_ID.fullmatch(str(source))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a possible file name
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
    """Raises UserError, with advice, if `path` is a known kind of file or folder that is not a checkpoint."""
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
    """The message for a file that was given instead of a folder."""
    suffix = Path(name).suffix or name
    if suffix == ".safetensors":
        return "is a file of weights: give its folder, which must also contain config.json"
    if suffix == ".gguf":
        return "is a GGUF file, which cannot be read: give the model as its authors released it (safetensors)"
    if f"*{suffix}" in PICKLED:
        return refuse_pickles([name])
    return "is a file, not a checkpoint folder"
