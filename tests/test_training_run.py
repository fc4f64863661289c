"""Whole runs of train.py: learning, stopping, resuming, exporting; on several devices and processes; refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from xl2jax.cli import infer
from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.convert import main as convert
from xl2jax.demo import make_checkpoint, write_clip

ROOT = Path(__file__).parent.parent
ANSWERS = ("Red.", "Blue.", "Four.", "A ring.")
QUESTION = "<image>\nWhat is it?"
_PINNED = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


def rows(answers: tuple[str, ...] = ANSWERS) -> list[dict[str, Any]]:
    return [
        {"id": f"s{i}", "video": f"{i % 4}.mp4", "conversations": [
            {"from": "human", "value": QUESTION}, {"from": "gpt", "value": answer}]}
        for i, answer in enumerate(answers)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real files that look different, each with its own answer; eight samples for batches of 8."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        write_clip(folder / f"{i}.mp4", 20, fps=1 + i, width=32 + 32 * i, height=64)
    (folder / "four.json").write_text(json.dumps(rows()))
    (folder / "eight.json").write_text(json.dumps(rows(ANSWERS * 2)))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the tiny one: DTS norms over a single channel of similar frames magnify rounding a thousandfold."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    tiny = PRESETS["tiny"]
    vision, llm = dataclasses.replace(tiny.vision, width=64, layers=2), dataclasses.replace(tiny.llm, layers=2)
    make_checkpoint(folder, dataclasses.replace(tiny, vision=vision, llm=llm))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


type Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(checkpoint: Path, data: Path, cache: Path) -> Iterator[Start]:
    """Starts train.py in a process of its own. The compiler is told to hurry."""
    running = []

    def run(
        output: Path,
        *flags: object,
        file: str = "four.json",
        devices: int = 1,
        code: str | None = None,
        core: int | None = None,
    ) -> Any:
        xla = f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}
        if "--coordinator" not in flags:  # cached CPU programs order their collectives otherwise than fresh ones
            env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        common = (
            "--checkpoint", checkpoint, "--data", data / file, "--output", output, "--max-frames", 4,
            "--compute-dtype", "float32", "--no-tensorboard", "--export-dtype", "float32",
        )  # fmt: skip
        program = ["train.py"] if code is None else ["-c", code]
        if core is not None:  # not preexec_fn: JAX warns of any fork
            program = ["-c", _PINNED, str(core), *program]
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, (*common, *flags))], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == status, out[-3000:]
    return out


def metrics(output: Path) -> list[dict[str, float]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


LEARN = ("--global-batch", 4, "--epochs", 70, "--learning-rate", 2e-3, "--save-every", 20)


def test_learns_stops_resumes_exports_and_answers(
    start: Start, data: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    straight = start(tmp_path / "straight", *LEARN, "--export", tmp_path / "straight-out")
    finished(straight)
    stopped = start(tmp_path / "stopped", *LEARN)
    while len(metrics(tmp_path / "stopped")) < 5:
        assert stopped.poll() is None, stopped.communicate()[0][-3000:]
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    out = finished(stopped, 143)
    done = len(metrics(tmp_path / "stopped"))
    assert f"SIGTERM: saved step {done} of 70" in out
    assert 5 <= done < 70
    # What a crash in the middle of a save leaves, and rows of steps that were never saved.
    (tmp_path / "stopped" / "checkpoints" / "69.orbax-checkpoint-tmp").mkdir()
    with open(tmp_path / "stopped" / "metrics.jsonl", "a") as f:
        f.write('{"step": 69, "loss": 0}\n{"step": 7')
    out = finished(start(tmp_path / "stopped", *LEARN, "--export", tmp_path / "out", "--workers", 1, "--keep", 1))
    assert f"resumed from step {done}" in out
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["70"]
    one, two = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert [r["step"] for r in two] == list(range(1, 71))
    assert [(r["loss"], r["grad_norm"]) for r in one] == [(r["loss"], r["grad_norm"]) for r in two]
    a, b = (load_file(tmp_path / f / "model.safetensors") for f in ("straight-out", "out"))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert one[-1]["loss"] < 0.05 * one[0]["loss"]
    status, _, err = command(convert, tmp_path / "out", tmp_path / "orbax")
    assert status == 0, err
    for i in (0, 3):
        status, out, err = command(
            infer, "--checkpoint", tmp_path / "orbax", "--video", data / f"{i}.mp4", "--question", "What is it?",
            "--max-frames", 4, "--decode", "dense",
        )  # fmt: skip
        assert status == 0, err
        assert out.strip() == ANSWERS[i]


def test_adapters_train_resume_and_merge_into_the_checkpoint(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    """bfloat16 compute: what is frozen is exported as it was, bit for bit, not as the compute copy has it."""
    flags = (
        "--global-batch",
        4,
        "--epochs",
        6,
        "--learning-rate",
        1e-2,
        "--save-every",
        3,
        "--lora-rank",
        4,
        "--keep",
        9,
    )
    flags += ("--compute-dtype", "bfloat16", "--train", "projector.*")
    finished(start(tmp_path / "run", *flags))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert "resumed from step 3" in finished(start(tmp_path / "run", *flags, "--export", tmp_path / "out"))
    before, after = (load_file(p / "model.safetensors") for p in (checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    linear = {n for n in before if ".layers." in n and "vision" not in n and n.endswith("_proj.weight")}
    assert changed == linear | {n for n in before if "mm_projector" in n}
    rows = metrics(tmp_path / "run")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]


SHORT = ("--global-batch", 8, "--epochs", 3)
MESHES = {"data": (1, 1), "fsdp": (8, 1), "all": (2, 2)}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


def same_training(a: Path, b: Path, checkpoint: Path) -> None:
    """Losses and parameters equal to 1e-5. Adam turns a gradient of 0 plus rounding into a whole step, so what was
    learnt is compared over all parameters."""
    for x, y in zip(metrics(a / "run"), metrics(b / "run"), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-4)
    first, one, two = (load_file(p / "model.safetensors") for p in (checkpoint, a / "out", b / "out"))

    def norm(x: dict[str, np.ndarray], y: dict[str, np.ndarray] | None = None) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x[n] - (0 if y is None else y[n]), dtype=np.float64)) for n in x)))

    assert norm(one, two) < 1e-5 * norm(one)
    assert norm(one, two) < 1e-2 * norm(one, first)


def test_every_mesh_trains_as_one_device(start: Start, single: Path, tmp_path: Path, checkpoint: Path) -> None:
    alone = start(single / "run", *SHORT, "--export", single / "out", file="eight.json")
    # All meshes in one process: the flags of the second and later runs replace the output.
    code = f"""
import sys, dataclasses
from pathlib import Path
from xl2jax.terminal import setup_logging
from xl2jax.training.config import parse
from xl2jax.training.run import train
setup_logging()
base = parse(sys.argv[1:])
for name, (fsdp, tensor) in {MESHES!r}.items():
    folder = base.output / name
    train(dataclasses.replace(base, fsdp=fsdp, tensor=tensor, output=folder / "run", export=folder / "out"))
"""
    finished(start(tmp_path, *SHORT, file="eight.json", devices=8, code=code))
    finished(alone)
    for name in MESHES:
        same_training(single, tmp_path / name, checkpoint)


def test_two_processes_train_save_and_resume(start: Start, single: Path, tmp_path: Path, checkpoint: Path) -> None:
    if not metrics(single / "run"):
        finished(start(single / "run", *SHORT, "--export", single / "out", file="eight.json"))

    # One core each: with more, the CPU backend may run independent collectives of a program in any order.
    cores = sorted(os.sched_getaffinity(0))

    def both(*flags: object) -> list[str]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        processes = [
            start(
                tmp_path / "run", *SHORT, "--coordinator", address, "--processes", 2, "--process", i, "--micro-batch", 2,
                *flags, file="eight.json", core=cores[i % len(cores)],
            )
            for i in range(2)
        ]  # fmt: skip
        return [finished(p) for p in reversed(processes)][::-1]

    both("--save-every", 1, "--keep", 9)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    out = both("--export", tmp_path / "out")
    assert "resumed from step 2" in out[0]
    assert "mesh                     data 1 x fsdp 2 x tensor 1" in out[0]
    same_training(single, tmp_path, checkpoint)


def test_not_a_number_stops_the_run(start: Start, tmp_path: Path) -> None:
    flags = ("--global-batch", 2, "--epochs", 9, "--learning-rate", 1e30, "--warmup", 0, "--save-every", 1)
    out = finished(start(tmp_path / "run", *flags), 2)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: step ")
    assert "loss nan" in last or "loss inf" in last
    assert "samples s" in last
    good = metrics(tmp_path / "run")
    assert all(np.isfinite(r["loss"]) for r in good)
    newest = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert newest == len(good)


def test_dry_run_reads_no_weights_and_no_media(
    tmp_path: Path, checkpoint: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "d.json").write_text(json.dumps(rows()))  # the videos are not there
    shutil.copytree(checkpoint, tmp_path / "ck", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ("--checkpoint", tmp_path / "ck", "--data", tmp_path / "d.json", "--output", tmp_path / "o", "--dry-run")
    status, out, err = command(train.main, *flags, "--preset", "stage2", "--global-batch", 2)
    assert status == 0, err
    config = VideoXL2Config.from_hf(checkpoint)
    projector = config.vision.width * config.llm.width + config.llm.width + config.llm.width**2 + config.llm.width
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert table["projector"] == [f"{projector:,}", f"{projector:,}"]
    assert table["vision"][1] == table["llm"][1] == "0"
    assert table["steps"] == ["2", "in", "1", "epochs"]
    assert "optimizer state" in out
    assert not (tmp_path / "o").exists()


def test_validate_data_reports(
    data: Path, tmp_path: Path, checkpoint: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    (data / "broken.mp4").write_bytes((data / "0.mp4").read_bytes()[:200])
    broken = [*rows(), {**rows()[0], "id": "x", "video": "broken.mp4"}, {**rows()[0], "id": "y", "video": "none.mp4"}]
    (data / "some.json").write_text(json.dumps(broken))
    flags = ("--checkpoint", checkpoint, "--data", data / "some.json", "--output", tmp_path / "o", "--global-batch", 1)
    status, out, _ = command(train.main, *flags, "--validate-data")
    assert status == 1
    assert "sample x: " in out
    assert "sample y: " in out
    assert "4 can be used, 2 cannot" in out


def test_refusals(data: Path, tmp_path: Path, checkpoint: Path, copied: Path, refused: Callable[..., str]) -> None:
    def refuse(*flags: object, ck: Path = checkpoint, file: Path = data / "four.json") -> str:
        # The plan may have been printed by then: only stderr's last line counts here.
        return refused(train.main, "--checkpoint", ck, "--data", file, "--output", tmp_path / "o", *flags)

    assert "no such file" in refuse(file=tmp_path / "none.yaml")
    assert "no such checkpoint folder" in refuse(ck=tmp_path / "none")
    assert "--global-batch must be 1 or more" in refuse("--global-batch", 0)
    assert "not a multiple of 3" in refuse("--global-batch", 4, "--micro-batch", 3)
    assert "go together" in refuse("--coordinator", "localhost:1")
    assert "PATTERN=RATE" in refuse("--rates", "vision")
    assert "matches no parameter" in refuse("--train", "vission.*")
    (tmp_path / "exists").mkdir()
    assert "already exists" in refuse("--export", tmp_path / "exists")
    assert "max frames must be 4 or more" in refuse("--max-frames", 3)


def test_late_refusals(data: Path, tmp_path: Path, copied: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Those that come behind the printed plan."""

    def line(*flags: object, ck: Path = copied, file: Path = data / "four.json") -> str:
        status, _, err = command(
            train.main, "--checkpoint", ck, "--data", file, "--output", tmp_path / "o", "--global-batch", 4, *flags
        )
        assert status == 2
        assert "Traceback" not in err
        return err.strip().splitlines()[-1]

    (tmp_path / "gone.json").write_text(json.dumps(rows()))
    assert "not one sample can be used" in line(file=tmp_path / "gone.json")
    make_checkpoint(tmp_path / "other", PRESETS["tiny"])
    (copied / "model.safetensors").unlink()
    assert "no safetensors file" in line()
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw | {"intermediate_size": 128}))
    assert "misshapen" in line(ck=tmp_path / "other")
    (tmp_path / "file").write_text("")
    assert "cannot be made" in line("--output", tmp_path / "file" / "o")


def test_another_run_in_the_output_is_refused(start: Start, single: Path) -> None:
    if not metrics(single / "run"):
        finished(start(single / "run", *SHORT, "--export", single / "out", file="eight.json"))
    out = finished(start(single / "run", "--global-batch", 8, "--epochs", 4, file="eight.json"), 2)
    last = out.strip().splitlines()[-1]
    assert "holds a run with other settings" in last
    assert "epochs 3 -> 4" in last
