"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, then renamed.

What is unfinished has a name of its own, `.{name}.incomplete-{host}-{process}-{random}`, so that two writers never
share one. It vanishes when its writer fails; what a writer that was killed left behind is removed by the next one that
writes to the same place.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from xl2jax.errors import UserError

_TOKEN = secrets.token_hex(4)  # tells this process from an earlier one that had the same number
_NUMBERS = itertools.count()
_HOST = os.uname().nodename.replace("/", "")

_EXISTS = "already exists; choose another place or remove it first"
_REASONS = {
    errno.ENOSPC: "no space left on the disk; nothing was kept",
    errno.EDQUOT: "the disk quota is used up; nothing was kept",
    errno.EACCES: "cannot be written (no permission)",
    errno.EPERM: "cannot be written (no permission)",
    errno.EROFS: "cannot be written (the file system is read-only)",
    errno.ENOENT: "cannot be written (no such folder)",
    errno.ENOTDIR: "cannot be written (a part of the path is not a folder)",
    errno.EEXIST: _EXISTS,
    errno.ENOTEMPTY: _EXISTS,
    errno.EISDIR: "is a folder, not a file; choose another name",
}


@contextlib.contextmanager
def replacing_file(path: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` when the block ends well, else vanishes.

    The file at `path`, if there is one, is whole at every moment: the old one or the new one. Of two writers at once
    the last wins. A symbolic link at `path` stays: the file that it points to is replaced.

    Raises UserError if there is a folder, a pipe or a device at `path`, or if it cannot be written there, or if fewer
    than `need_bytes` are free.
    """
    with _beside(path, need_bytes) as (place, beside):
        _refuse_irregular(place)
        yield beside
        _sync(beside)
        beside.replace(place)


@contextlib.contextmanager
def replacing_folder(path: Path, need_bytes: int = 0) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well, else vanishes.

    Folders above `path` are made. Raises UserError if `path` exists, also if another process made it meanwhile, or if
    it cannot be written there, or if fewer than `need_bytes` are free.
    """
    refuse_existing(path)
    with _beside(path, need_bytes, parents=True) as (place, beside):
        beside.mkdir()
        yield beside
        for folder, _, files in os.walk(beside):
            for name in files:
                _sync(Path(folder, name))
            _sync_folder(Path(folder))
        if os.path.lexists(place):  # os.replace would take the place of an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        beside.replace(place)


def check_file_target(path: Path) -> None:
    """Raises UserError where `replacing_file` would, as far as that can be known: before hours of work."""
    with _beside(path) as (place, beside):
        _refuse_irregular(place)
        beside.touch(exist_ok=False)
        beside.unlink()


def check_folder_target(path: Path) -> None:
    """Raises UserError where `replacing_folder` would, as far as that can be known. Creates nothing."""
    refuse_existing(path)
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise UserError(f"{path}: cannot be created ({e.strerror})") from None
    parent = next(p for p in path.absolute().parents if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be created in {parent} (not a folder that can be written to)")


def refuse_existing(path: Path) -> None:
    """Raises UserError where there is already a file, a folder or a link."""
    if os.path.lexists(path):
        raise UserError(f"{path}: {_EXISTS}")


@contextlib.contextmanager
def _beside(path: Path, need_bytes: int = 0, *, parents: bool = False) -> Iterator[tuple[Path, Path]]:
    """Where `path` is with all links followed, and a unique name beside it.

    What has that name when the block fails is removed. An OSError becomes a UserError.
    """
    place = Path(os.path.realpath(path))
    beside = place.parent / f"{_prefix(place)}{_HOST}-{os.getpid()}-{_TOKEN}.{next(_NUMBERS)}"
    try:
        if parents:
            _make_folder(place.parent)
        free = shutil.disk_usage(place.parent).free
        if free < need_bytes:
            raise UserError(f"{path}: needs {need_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there")
        _remove_leftovers(place)
        yield place, beside
        _sync_folder(place.parent)
    except BaseException as e:
        _remove(beside)
        if isinstance(e, OSError):
            raise UserError(f"{path}: {_reason(e, place, beside)}") from e
        raise


def _reason(error: OSError, place: Path, beside: Path) -> str:
    """What happened, in words. A file that is neither the target nor a folder above it is named."""
    about = str(error.filename or "")
    if not about.startswith(str(beside)) and not str(place).startswith(about):
        return f"cannot be written ({about}: {error.strerror})"
    return _REASONS.get(error.errno or 0, f"cannot be written ({error.strerror or error})")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def _refuse_irregular(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is a pipe or a device, not a file; choose another name")


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}.incomplete-"  # a name may have 255 bytes: the long ones are cut


def _remove_leftovers(path: Path) -> None:
    """Removes what writers of `path` that were killed left beside it; those of writers that still run are left alone."""
    prefix = f"{_prefix(path)}{_HOST}-"
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and not _is_running(*name.removeprefix(prefix).partition("-")[::2]):
            _remove(path.with_name(name))


def _is_running(process: str, token: str) -> bool:
    if process == str(os.getpid()):
        return token.startswith(_TOKEN)
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # somebody else's
    except (ProcessLookupError, OverflowError):
        return False
    except ValueError:
        return True  # not a name of ours
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    """Waits until the bytes are on the disk: a full disk may say so only now."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    """The same for names. Not every file system can, and none loses what was written before because of it."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
