from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Programs are compiled with few optimisations: most of the suite's time is compiling, and what it checks is not speed.
# (`make slow-test` sets this to 0: upstream's numbers are also checked with all optimisations.)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Several tests run the same programs: all processes of a session share what was compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="xl2jax-compiled-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": _COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}

import pytest

import xl2jax
from xl2jax.config import PRESETS
from xl2jax.system.terminal import run_command
from xl2jax.testing import make_checkpoint, write_clip

GOLDENS = Path(__file__).parent / "goldens"

# Files that take longest run first, so that no process is left with a long one at the end.
LONGEST = [
    "test_serving",
    "test_generate",
    "test_page",
    "test_offload",
    "test_gpu_kernels",
    "test_infer",
    "test_terminal",
    "test_weights",
    "test_training_run",
    "test_run_batch",
    "test_serving_parts",
    "test_prefill",
    "test_benchmarks",
    "test_verify",
    "test_model",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint(folder, PRESETS["tiny"])
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint` to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> xl2jax.Model:
    return xl2jax.load(checkpoint)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 seconds at 10 frames a second: 148 frames as sampled by default (every second one), 37 groups."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, 30, fps=10, width=96, height=64)
    return path


@pytest.fixture(scope="session")
def watched(model: xl2jax.Model, clip: Path) -> xl2jax.WatchedVideo:
    return model.watch(clip)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line's main function: (exit status, stdout, stderr)."""

    def run(main: Callable[[], int | None], *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        monkeypatch.setattr(os, "_exit", sys.exit)  # how a command ends after Ctrl-C
        capfd.readouterr()
        with pytest.raises(SystemExit) as e:
            run_command(main)
        out, err = capfd.readouterr()
        return int(e.value.code or 0), out, err

    return run


@pytest.fixture
def ask(
    request: pytest.FixtureRequest, command: Callable[..., tuple[int, str, str]], clip: Path, checkpoint: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `infer` on the clip, with the flags `FAST` of the test's module: (exit status, stdout, stderr)."""
    from xl2jax.commands import infer

    def run(*flags: object) -> tuple[int, str, str]:
        return command(infer.main, "--video", clip, "--checkpoint", checkpoint, *request.module.FAST, *flags)

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command that must end in one clear line and status 2: that line."""

    def run(main: Callable[[], int | None], *argv: object) -> str:
        status, out, err = command(main, *argv)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2, err
        assert "Traceback" not in err
        assert out == ""
        assert len(errors) == 1, err
        assert err.rstrip().splitlines()[-1] == errors[0]
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """Imports a program of tools/ by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their annotations there
        spec.loader.exec_module(module)
        return module

    return load
