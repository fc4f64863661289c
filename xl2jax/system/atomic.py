"""Writes files and folders that appear complete or not at all.

They are written under a temporary name beside their target, flushed to the disk, then renamed. The temporary name,
`.{name}.incomplete-{host}-{process}-{random}`, is unique to each writer. It is removed if the writer fails. If a writer
is killed, the next one with the same target removes what is left.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from xl2jax.errors import UserError

_TOKEN = secrets.token_hex(4)  # distinguishes this process from an earlier one with the same id
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
    """Gives a temporary path to write to. It replaces `path` when the block succeeds, and is removed otherwise.

    At every moment `path` is the complete old file or the complete new one. If two processes write at once, the last
    one wins. If `path` is a symbolic link, its target is replaced and the link stays.

    Raises:
      UserError: `path` is a folder, a pipe or a device, it cannot be written, or fewer than `need_bytes` are free.
    """
    with _temporary(path, need_bytes) as (target, temporary):
        _refuse_irregular(target)
        yield temporary
        _sync(temporary)
        temporary.replace(target)


@contextlib.contextmanager
def replacing_folder(path: Path, need_bytes: int = 0) -> Iterator[Path]:
    """Gives a new empty folder to fill. It becomes `path` when the block succeeds, and is removed otherwise.

    Parent folders are created.

    Raises:
      UserError: `path` exists (or another process creates it meanwhile), it cannot be written, or fewer than
        `need_bytes` are free.
    """
    refuse_existing(path)
    with _temporary(path, need_bytes, parents=True) as (target, temporary):
        temporary.mkdir()
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder, name))
            _sync_folder(Path(folder))
        if os.path.lexists(target):  # os.replace would overwrite an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        temporary.replace(target)


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Gives a new empty folder in `parent`, which is removed after the block. What killed processes left is removed too.

    Only this user can read it. Raises UserError where it cannot be made.
    """
    # A folder with a temporary name that never gets another one.
    with _temporary(parent / name, parents=True) as (_, temporary):
        temporary.mkdir(mode=0o700)
    try:
        yield temporary
    finally:
        _remove(temporary)


def check_file_target(path: Path) -> None:
    """Raises UserError if `replacing_file` would, as far as that can be known before the work begins."""
    with _temporary(path) as (target, temporary):
        _refuse_irregular(target)
        temporary.touch(exist_ok=False)
        temporary.unlink()


def check_folder_target(path: Path) -> None:
    """Raises UserError if `replacing_folder` would, as far as that can be known. Creates nothing."""
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
    """Raises UserError if `path` is already a file, a folder or a link."""
    if os.path.lexists(path):
        raise UserError(f"{path}: {_EXISTS}")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers of any file in `folder` left there, but nothing of running writers."""
    for name in os.listdir(folder):
        _, mark, rest = name.partition(f".incomplete-{_HOST}-")
        if name.startswith(".") and mark and not _is_running(*rest.partition("-")[::2]):
            _remove(folder / name)


@contextlib.contextmanager
def _temporary(path: Path, need_bytes: int = 0, *, parents: bool = False) -> Iterator[tuple[Path, Path]]:
    """Gives `path` with all links resolved, and a unique temporary name beside it.

    If the block fails, the file or folder with the temporary name is removed. An OSError becomes a UserError.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f"{_prefix(target)}{_HOST}-{os.getpid()}-{_TOKEN}.{next(_NUMBERS)}"
    try:
        if parents:
            _make_folder(target.parent)
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes:
            raise UserError(f"{path}: needs {need_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there")
        _remove_leftovers(target)
        yield target, temporary
        _sync_folder(target.parent)
    except BaseException as e:
        _remove(temporary)
        if isinstance(e, OSError):
            raise UserError(f"{path}: {_reason(e, target, temporary)}") from e
        raise


def _reason(error: OSError, target: Path, temporary: Path) -> str:
    """The reason for the failure. It names the file, unless that is the target or one of its parents."""
    about = str(error.filename or "")
    if not about.startswith(str(temporary)) and not str(target).startswith(about):
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
    return f".{path.name[:40]}.incomplete-"  # file names are limited to 255 bytes


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of earlier writers of `path` that were killed, but not those of running writers."""
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
        return True  # a process of another user
    except (ProcessLookupError, OverflowError):
        return False
    except ValueError:
        return True  # not a name that this module made
    return True


def _remove(path: Path) -> None:
    """Removes a file or a folder. Threads that still write into it, as Orbax's do after an error, are outlasted."""
    for _ in range(50):
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()
        if not os.path.lexists(path):
            return
        time.sleep(0.1)


def _sync(path: Path) -> None:
    """Waits until the bytes are on the disk. A full disk may be reported only here."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    """Waits until a folder's names are on the disk. Errors are ignored: not every file system supports this."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
