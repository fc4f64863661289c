"""Downloads checkpoints from the Hugging Face hub into its cache. Cached checkpoints need no network."""

from __future__ import annotations

import errno
import fnmatch
import logging
from pathlib import Path

from xl2jax.checkpoint.orbax_folder import MANIFEST
from xl2jax.checkpoint.safetensors_io import PICKLED, refuse_pickles
from xl2jax.errors import UserError, first_line, shorten

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds
_NEEDED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "params/*"]
_NOT_NEEDED = ["*/*.safetensors", "*/*.txt"]
"""Weights in subfolders belong to other models or formats (original/, onnx/, checkpoint-500/)."""


def download(repo: str, revision: str | None = None) -> Path:
    """Downloads a repository and returns its folder in the hub's cache. If the hub fails, a cached copy is used.

    Only needed files are downloaded, and nothing if the weights are pickles. `revision` is a branch, a tag or a commit,
    by default the main branch.

    Raises:
      UserError: the repository or the revision does not exist or may not be read, or the hub cannot be reached and the
        cache has no complete copy. The message says what to do.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        # This request is tried only once. huggingface_hub retries others for 20 seconds if there is no network.
        about = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
        _refuse_unsafe(name, [file.rfilename for file in about.siblings or []])
    except (UserError, RevisionNotFoundError) as e:
        raise e if isinstance(e, UserError) else UserError(f"{name}: {_advice(repo, e)}") from e
    except Exception as e:  # huggingface_hub raises many unrelated types
        advice = _advice(repo, e)
        return _cached(name, repo, revision, advice)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_NEEDED, ignore_patterns=_NOT_NEEDED))
    except Exception as e:
        raise UserError(f"{name}: the download stopped: {_advice(repo, e)}; the files so far are kept") from e


def _cached(name: str, repo: str, revision: str | None, advice: str) -> Path:
    """The copy in the cache. `advice` says why the hub could not be used, and what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=_NEEDED, ignore_patterns=_NOT_NEEDED, local_files_only=True
        )
    except IncompleteSnapshotError:
        raise UserError(f"{name}: the copy in the hub's cache is not complete, and {advice}") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{name}: no such folder, not in the hub's cache, and {advice}") from None
    if not any(Path(folder).glob("*.safetensors")) and not Path(folder, MANIFEST).is_file():
        raise UserError(f"{name}: the copy in the hub's cache has no weights, and {advice}")
    logger.warning("%s: the copy in the hub's cache is used, because the hub could not be used (%s)", name, advice)
    return Path(folder)


def _refuse_unsafe(name: str, files: list[str]) -> None:
    """Raises UserError unless the repository has weights that are not pickles."""
    if MANIFEST in files or any(fnmatch.fnmatch(f, "*.safetensors") for f in files):
        return
    pickled = [f for f in files for pattern in PICKLED if fnmatch.fnmatch(f, pattern)]
    if pickled:
        raise UserError(f"{name}: {refuse_pickles(pickled)}")
    raise UserError(f"{name}: the repository has no safetensors file")


def _advice(repo: str, error: Exception) -> str:
    """Describes an error of huggingface_hub, and says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: unset it, or run `hf download {repo}` with a network"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its conditions at {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no repository {repo}, or it is private: check the name, "
            "and log in with `hf auth login` if you have access to it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no such revision: see {page}/tree/main for its branches and tags"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        reason = shorten(error.server_message or "no reason given", 200)
        advice = "log in again with `hf auth login`" if status in (401, 403) else "try again later"
        return f"the hub answers {status} ({reason}): {advice}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left for the hub's cache {constants.HF_HUB_CACHE}: set HF_HOME to another disk"
    if isinstance(error, PermissionError):
        return f"the hub's cache {constants.HF_HUB_CACHE} cannot be written: set HF_HOME to another folder"
    return f"the hub cannot be reached ({first_line(error)}): check the network, and run the same command again"
