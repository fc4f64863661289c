"""What `pip install` of the wheel gives: the command, type information, and a clear word about checkpoints."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, unpacked as an installer lays them."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`xl2jax ARGUMENTS` with the installed package, from a folder that is no checkout."""
    (metadata,) = installed.glob("xl2jax-*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(metadata / "entry_points.txt")
    module, _, function = scripts["console_scripts"]["xl2jax"].partition(":")
    program = f"import sys; sys.argv[0] = 'xl2jax'; from {module} import {function}; {function}()"
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, cwd=installed, env=env, capture_output=True, text=True, check=False)


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    modules = {p.relative_to(ROOT) for p in (ROOT / "xl2jax").rglob("*.py")}
    assert {p.relative_to(installed) for p in (installed / "xl2jax").rglob("*.py")} == modules
    assert (installed / "xl2jax" / "py.typed").is_file()


def test_the_page_is_in_the_wheel(installed: Path) -> None:
    page = Path("xl2jax", "serving", "page")
    files = {path.name: path.read_bytes() for path in (ROOT / page).iterdir()}
    assert {path.name: path.read_bytes() for path in (installed / page).iterdir()} == files
    assert {"index.html", "page.css", "page.js"} <= set(files)


def test_the_command(installed: Path) -> None:
    listed = run(installed, "--help")
    assert listed.returncode == 0
    for name in ("infer", "train", "convert", "verify", "plan", "needle", "bench"):
        assert f"  {name} " in listed.stdout
    unknown = run(installed, "ask")
    assert (unknown.returncode, unknown.stderr.startswith("error: no command 'ask'")) == (2, True)


@pytest.mark.slow
def test_the_command_says_how_to_get_a_checkpoint(installed: Path, clip: Path) -> None:
    answer = run(installed, "infer", "--video", str(clip), "--question", "What?")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no checkpoint is installed: give --checkpoint")
    assert run(installed, "train", "--help").returncode == 0
