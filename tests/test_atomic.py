"""Files and folders appear complete or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xl2jax.errors import UserError
from xl2jax.system import atomic


def nothing() -> None:
    pass


def write(path: Path, text: str = "new", then: Callable[[], None] = nothing) -> None:
    with atomic.replacing_file(path) as beside:
        beside.write_text(text)
        then()


def fill(path: Path, text: str = "new", then: Callable[[], None] = nothing) -> None:
    with atomic.replacing_folder(path) as beside:
        (beside / "deep").mkdir()
        (beside / "deep" / "file").write_text(text)
        then()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_files_and_folders_are_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with atomic.replacing_file(tmp_path / "file") as beside:
        beside.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
        assert beside.parent == tmp_path  # the same file system, so that renaming is atomic
    fill(tmp_path / "made" / "folder")
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "made" / "folder" / "deep" / "file").read_text() == "new"
    assert names(tmp_path) == ["file", "made"]


@pytest.mark.parametrize("make", [write, fill])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(errno.EIO, "Input/output error")])
def test_a_failure_leaves_nothing(make: Callable[..., None], error: BaseException, tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        make(tmp_path / "target", then=fail)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk; nothing was kept"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EDQUOT, "quota"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_system_errors_are_one_line(
    code: int, message: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "target").write_text("old")
    if call != "write":
        owner, name = {"fsync": (os, "fsync"), "replace": (Path, "replace")}[call]
        monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(UserError, match=message):
        write(tmp_path / "target", "half", refuse if call == "write" else nothing)
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target").read_text() == "old"


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    for context in (atomic.replacing_file, atomic.replacing_folder):
        with pytest.raises(UserError, match="out: cannot be written .*source: No such file"), context(tmp_path / "out"):
            (tmp_path / "source").read_bytes()


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for check in (write, atomic.check_file_target):
        for target, message in (
            ("folder", "is a folder"),
            ("pipe", "is a pipe or a device"),
            ("none/file", "no such folder"),
            ("file/below", "not a folder"),
            ("n" * 300, "too long"),
            ("/", "is a folder"),
        ):
            with pytest.raises(UserError, match=message):
                check(tmp_path / target)
    for taken in ("folder", "file", "pipe"):
        with pytest.raises(UserError, match="already exists"):
            fill(tmp_path / taken)
    with pytest.raises(UserError, match="not a folder"):
        fill(tmp_path / "file" / "below")
    assert names(tmp_path) == ["file", "folder", "pipe"]
    atomic.check_file_target(tmp_path / "file")
    atomic.check_file_target(tmp_path / ("n" * 255))
    assert (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path) == ["file", "folder", "pipe"]


def test_a_path_is_shown_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    write(Path("link/file"))
    assert names(tmp_path / "real") == ["file"]
    with pytest.raises(UserError, match="^link/none/file: cannot be written .no such folder.$"):
        write(Path("link/none/file"))


def test_too_little_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9 - 10**5}))
    for context in (atomic.replacing_file, atomic.replacing_folder):
        with (
            pytest.raises(UserError, match="needs 1,000.0 MB, 999.9 MB are free"),
            context(tmp_path / "x", need_bytes=10**9),
        ):
            raise AssertionError
    assert names(tmp_path) == []


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"


def test_two_folders_at_once(tmp_path: Path) -> None:
    """Two writers overlap: the first result is complete, and the second writer reports an error."""
    with pytest.raises(UserError, match="already exists"):
        fill(tmp_path / "full", "second", lambda: fill(tmp_path / "full", "first"))
    with pytest.raises(UserError, match="already exists"):
        fill(tmp_path / "empty", "second", (tmp_path / "empty").mkdir)
    assert (tmp_path / "full" / "deep" / "file").read_text() == "first"
    assert names(tmp_path / "empty") == []
    assert names(tmp_path) == ["empty", "full"]


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """Threads share a process id but not a temporary name: each version of the file is complete."""
    texts = [str(i) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=write, args=(tmp_path / "file", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts
    assert names(tmp_path) == ["file"]


_KILLED = """
import sys
from pathlib import Path
from xl2jax.system import atomic
with atomic.replacing_file(Path(sys.argv[1])) as file, atomic.replacing_folder(Path(sys.argv[2])) as folder:
    file.write_text("half")
    (folder / "half").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_only_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    file, folder = tmp_path / "[a] file", tmp_path / "folder"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, file, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    running = set(names(tmp_path))
    assert len(running) == 2
    write(file)
    fill(folder)
    assert set(names(tmp_path)) == running | {file.name, folder.name}
    process.kill()
    process.communicate()
    shutil.rmtree(folder)
    write(file)
    fill(folder)
    assert names(tmp_path) == [file.name, folder.name]


def test_an_earlier_process_with_the_same_id(tmp_path: Path) -> None:
    """In a container every run may have process id 1."""
    with atomic.replacing_file(tmp_path / "file") as beside:
        beside.write_text("new")
        token = beside.name.rpartition("-")[2].partition(".")[0]
        (tmp_path / beside.name.replace(token, "0" * len(token))).write_text("half")
        elsewhere = tmp_path / beside.name.replace(f"{os.uname().nodename}-", "another-host-")
        elsewhere.write_text("half")
    write(tmp_path / "file")
    assert names(tmp_path) == sorted(["file", elsewhere.name])


def test_a_failed_plot_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from xl2jax.recipes.demo.figures import plot_losses

    curves = {"stage": [(1, 2.0), (2, 1.0)]}
    plot_losses(tmp_path / "whole.png", curves)

    def half(_: Figure, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(UserError, match="p.png: no space left"):
        plot_losses(tmp_path / "p.png", curves)
    assert names(tmp_path) == ["whole.png"]
