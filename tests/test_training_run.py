"""Whole runs of train.py: learning, stopping, resuming and exporting; several devices and processes; full disks."""

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

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from safetensors.numpy import load_file, save_file
from training_runs import ANSWERS, QUESTION, board, last_line, metrics, whole_checkpoints, write_data

import train
from xl2jax.commands import infer
from xl2jax.commands.convert import main as convert
from xl2jax.commands.train import parse
from xl2jax.config import PRESETS
from xl2jax.testing import make_checkpoint
from xl2jax.training import run as run_module
from xl2jax.training.identity import MAY_DIFFER
from xl2jax.training.step import Steps
from xl2jax.training.telemetry import Telemetry

ROOT = Path(__file__).parent.parent
_PINNED = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than tiny, whose DTS norms over a single channel of similar frames amplify rounding errors 1,000-fold."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    tiny = PRESETS["tiny"]
    vision, llm = dataclasses.replace(tiny.vision, width=64, layers=2), dataclasses.replace(tiny.llm, layers=2)
    make_checkpoint(folder, dataclasses.replace(tiny, vision=vision, llm=llm))
    return folder


def arguments(checkpoint: Path, data: Path, output: Path, *flags: object) -> list[str]:
    common = (
        "--checkpoint", checkpoint, "--data", data, "--output", output, "--max-frames", 4, "--no-remat",
        "--compute-dtype", "float32", "--export-dtype", "float32",
    )  # fmt: skip
    return [*map(str, (*common, *flags))]


type Trained = Callable[..., str]
type Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def programs() -> dict[str, Steps]:
    """Compiled programs, which runs with the same settings share."""
    return {}


@pytest.fixture
def trained(
    checkpoint: Path,
    data: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    programs: dict[str, Steps],
) -> Trained:
    """Runs train.py in this process and returns its output. Programs are compiled once."""

    def run(output: Path, *flags: object, file: str = "four.json", status: int = 0) -> str:
        argv = arguments(checkpoint, data / file, output, *flags)
        shaping = {k: v for k, v in dataclasses.asdict(parse(argv)).items() if k not in MAY_DIFFER}
        settings = f"{file} {shaping}"

        def compiled(*x: Any) -> Steps:
            if settings not in programs:
                programs[settings] = Steps(*x)
            return programs[settings]

        with monkeypatch.context() as m:
            m.setattr(run_module, "Steps", compiled)
            got, out, err = command(train.main, *argv)
        assert got == status, err[-3000:]
        return out + err

    return run


@pytest.fixture
def start(checkpoint: Path, data: Path) -> Iterator[Start]:
    """Starts train.py in another process."""
    running = []

    def run(
        output: Path,
        *flags: object,
        file: str = "four.json",
        devices: int = 1,
        code: str = "",
        core: int | None = None,
    ) -> Any:
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        if "--coordinator" in flags:  # cached CPU programs order their collectives differently from new ones
            env.pop("JAX_COMPILATION_CACHE_DIR", None)
        program = ["-c", f"import signal, train\n{code}\ntrain.run_command(train.main)"]
        if core is not None:  # preexec_fn would fork, of which JAX warns
            program = ["-c", _PINNED, str(core), *program]
        process = subprocess.Popen(
            [sys.executable, *program, *arguments(checkpoint, data / file, output, *flags)], cwd=ROOT, env=env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Sends a signal to a run in this process when the metrics of a step are logged."""
    step, before = (
        Telemetry.step,
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # it may be ignored otherwise

    def at(number: int, sent: int) -> None:
        def stepped(log: Telemetry, done: int, *rest: Any) -> None:
            step(log, done, *rest)
            if done == number:
                signal.raise_signal(sent)

        monkeypatch.setattr(Telemetry, "step", stepped)

    yield at
    signal.signal(signal.SIGINT, before)


def steps_done(process: subprocess.Popen[str], output: Path, steps: int) -> None:
    """Waits until a run has logged a number of steps."""
    path = output / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)


LEARN = ("--global-batch", 2, "--epochs", 30, "--learning-rate", 4e-3, "--save-every", 12)
KILLED_IN_A_SAVE = """
import os
from xl2jax.training.state import Checkpoints
save = Checkpoints.save
Checkpoints.save = lambda *x: (save(*x), os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_learns_stops_resumes_exports_and_answers(
    trained: Trained,
    start: Start,
    signal_at: Callable[[int, int], None],
    data: Path,
    checkpoint: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    """An interrupted run gives bit for bit the result of an uninterrupted one.

    It is stopped by SIGTERM, then by Ctrl-C, then killed during a save. Then the run, its data and its checkpoint move
    to other folders, which are given as relative paths.
    """
    trained(tmp_path / "straight", *LEARN, "--export", tmp_path / "straight-out", file="two.json")
    one, output = metrics(tmp_path / "straight"), tmp_path / "stopped"
    signal_at(4, signal.SIGTERM)
    assert last_line(trained(output, *LEARN, file="two.json", status=143)) == "SIGTERM: saved step 5 of 30"
    assert whole_checkpoints(output) == [5]
    assert len(metrics(output)) == 5
    signal_at(7, signal.SIGINT)
    out = trained(output, *LEARN, file="two.json", status=130)
    assert "resumed from step 5" in out
    assert last_line(out) == "Ctrl-C: saved step 8 of 30"
    assert len(metrics(output)) == 8
    signal_at(0, 0)
    finished(start(output, *LEARN, file="two.json", code=KILLED_IN_A_SAVE), -signal.SIGKILL)
    newest = whole_checkpoints(output)[-1]
    assert newest in (8, 12)
    with open(output / "metrics.jsonl", "a") as f:  # rows of steps that were not saved, one of them incomplete
        f.write('{"step": 29, "loss": 0}\n{"step": 4')
    moved = tmp_path / "moved"
    output.rename(moved)
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    relative = Path(os.path.relpath(tmp_path))
    out = trained(
        relative / "moved", *LEARN, "--export", relative / "out", "--workers", 1, "--keep", 1, "--data",
        relative / "data" / "two.json", "--checkpoint", relative / "checkpoint", file="two.json",
    )  # fmt: skip
    assert f"resumed from step {newest}" in out
    assert [p.name for p in (moved / "checkpoints").iterdir()] == ["30"]
    two = metrics(moved)
    assert [r["step"] for r in two] == list(range(1, 31))
    assert [(r["loss"], r["grad_norm"]) for r in one] == [(r["loss"], r["grad_norm"]) for r in two]
    seen = board(moved / "tensorboard")
    assert len({step for _, step in seen}) == 30
    assert all(seen["train/loss", int(r["step"])] == np.float32(r["loss"]) for r in two)
    a, b = (load_file(tmp_path / f / "model.safetensors") for f in ("straight-out", "out"))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert one[-1]["loss"] < 0.01 * one[0]["loss"]
    status, _, err = command(convert, tmp_path / "out", tmp_path / "orbax")
    assert status == 0, err
    for i in (0, 3):
        status, out, err = command(
            infer.main, "--checkpoint", tmp_path / "orbax", "--video", data / f"{i}.mp4", "--question", "What is it?",
            "--max-frames", 4, "--top-chunks", "all",
        )  # fmt: skip
        assert status == 0, err
        assert out.strip() == ANSWERS[i]


@pytest.mark.slow
def test_adapters_train_resume_and_merge_into_the_checkpoint(
    trained: Trained, checkpoint: Path, tmp_path: Path
) -> None:
    """With bfloat16 compute, frozen weights are exported bit for bit, and trained ones are kept in float32.

    Parameters with a learning rate of 0 do not change; the others have a constant rate after the warm-up.
    """
    flags = (
        "--global-batch", 4, "--epochs", 6, "--learning-rate", 1e-2, "--save-every", 3, "--lora-rank", 4, "--keep", 9,
        "--compute-dtype", "bfloat16", "--train", "projector.*", "--rates", "projector.fc1.*=0",
        "--schedule", "constant", "--warmup", 0.34,
    )  # fmt: skip
    trained(tmp_path / "run", *flags)
    with ocp.training.Checkpointer(tmp_path / "run" / "checkpoints") as stored:
        assert {x.dtype.name for x in jax.tree.leaves(stored.load())} == {"float32", "int32"}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert "resumed from step 3" in trained(tmp_path / "run", *flags, "--export", tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    linear = {n for n in before if ".layers." in n and "vision" not in n and n.endswith("_proj.weight")}
    assert changed == linear | {n for n in before if "mm_projector.2" in n}
    rows = metrics(tmp_path / "run")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert np.allclose([r["learning_rate"] for r in rows], [0, 1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])
    assert rows[-1]["loss"] < rows[0]["loss"]


SHORT = ("--global-batch", 8, "--epochs", 2)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


def reference(trained: Trained, single: Path) -> Path:
    """A run on one device, shared by the module: its checkpoints after both steps, and its export."""
    if not (single / "out").exists():
        trained(single / "run", *SHORT, "--save-every", 1, "--export", single / "out", file="eight.json")
    return single


def same_training(a: Path, b: Path, checkpoint: Path) -> None:
    """Losses and parameters agree to 1e-5.

    The change is compared over all parameters together, because Adam turns a gradient of 0 with a rounding error into a
    whole step.
    """
    for x, y in zip(metrics(a / "run"), metrics(b / "run"), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-4)
    first, one, two = (load_file(p / "model.safetensors") for p in (checkpoint, a / "out", b / "out"))

    def norm(x: dict[str, np.ndarray], y: dict[str, np.ndarray] | None = None) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x[n] - (0 if y is None else y[n]), dtype=np.float64)) for n in x)))

    assert norm(one, two) < 1e-5 * norm(one)
    assert norm(one, two) < 1e-2 * norm(one, first)


PACKED = ("--packing", "--max-length", 96, "--global-batch", 4)  # eight samples of some 46 tokens in four rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "flags"),
    [
        ((2, 2), PACKED),
        ((1, 1), ()),
        ((8, 1), ()),
        ((2, 2), ()),
    ],
)
def test_every_mesh_trains_as_one_device(
    trained: Trained,
    start: Start,
    single: Path,
    tmp_path: Path,
    checkpoint: Path,
    mesh: tuple[int, int],
    flags: tuple[object, ...],
) -> None:
    """Eight devices with all mesh axes give the result of one device; packed rows train as separate rows do.

    The other cases have only the data axis, only the fsdp axis, and two micro-batches of rows with one sample.
    """
    fsdp, tensor = mesh
    parts = ("--fsdp", fsdp, "--tensor", tensor, "--export", tmp_path / "out")
    process = start(tmp_path / "run", *SHORT, *flags, *parts, file="eight.json", devices=8)
    reference(trained, single)
    out = finished(process)
    assert f"fsdp {fsdp} x tensor {tensor}" in out
    assert not flags or "step                     4 rows = 1 micro-batches of 4" in out
    same_training(single, tmp_path, checkpoint)


SLOWLY = """
import time
from xl2jax.training.telemetry import Telemetry
step = Telemetry.step
Telemetry.step = lambda *x: (time.sleep(0.5), step(*x))
"""


@pytest.mark.slow
def test_two_processes_train_save_and_resume(trained: Trained, start: Start, tmp_path: Path, checkpoint: Path) -> None:
    """After SIGTERM to one of two processes both save the same step. One process resumes; two export the result."""
    flags = ("--global-batch", 8, "--epochs", 16, "--train", "llm.*", "--keep", 9)
    alone = (*flags, "--micro-batch", 8)

    # One core each, because with more the CPU backend may run independent collectives in any order.
    cores = sorted(os.sched_getaffinity(0))

    def both(*more: object, code: str = "") -> list[subprocess.Popen[str]]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        return [
            start(
                tmp_path / "run", *flags, "--coordinator", address, "--processes", 2, "--process", i,
                "--micro-batch", 4, *more, file="eight.json", core=cores[i % len(cores)], code=code,
            )
            for i in range(2)
        ]  # fmt: skip

    processes = both(code=SLOWLY)
    steps_done(processes[0], tmp_path / "run", 3)
    processes[1].send_signal(signal.SIGTERM)
    out = [finished(p, 143) for p in processes]
    (done,) = whole_checkpoints(tmp_path / "run")
    assert 3 <= done < 16
    assert last_line(out[0]) == f"SIGTERM: saved step {done} of 16"
    assert len(metrics(tmp_path / "run")) == done
    assert "mesh                     data 1 x fsdp 2 x tensor 1" in out[0]
    trained(tmp_path / "single" / "run", *alone, "--export", tmp_path / "single" / "out", file="eight.json")
    assert f"resumed from step {done}" in trained(tmp_path / "run", *alone, file="eight.json")
    out = [finished(p) for p in both("--export", tmp_path / "out")]
    assert "resumed from step 16" in out[0]
    same_training(tmp_path / "single", tmp_path, checkpoint)


FULL_DISK = """
import resource
from xl2jax.training.state import Checkpoints
save, hard = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
Checkpoints.save = lambda *x: (resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)), save(*x))
"""


@pytest.mark.slow
def test_a_failed_save_gives_one_line(trained: Trained, start: Start, single: Path, tmp_path: Path) -> None:
    """On a full disk the earlier checkpoint is unchanged, and the run resumes from it when there is space.

    The failing run has a process of its own, which ends Orbax's threads: in this one they could still be writing when
    the run resumes.
    """
    shutil.copytree(reference(trained, single) / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    kept = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints" / "1").rglob("*") if p.is_file()}
    out = finished(start(tmp_path / "run", *SHORT, file="eight.json", code=FULL_DISK), 2)
    assert "Traceback" not in out
    assert [line for line in out.splitlines() if line.startswith("error: ")] == [last_line(out)]
    assert "checkpoints: cannot be written (" in last_line(out)
    assert whole_checkpoints(tmp_path / "run") == [1]
    assert all(p.read_bytes() == data for p, data in kept.items())
    trained(tmp_path / "run", *SHORT, "--export", tmp_path / "out", file="eight.json")
    a, b = (load_file(p / "out" / "model.safetensors") for p in (single, tmp_path))
    assert all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.slow
def test_not_a_number_stops_the_run(trained: Trained, tmp_path: Path) -> None:
    flags = ("--global-batch", 2, "--epochs", 9, "--learning-rate", 1e30, "--warmup", 0, "--save-every", 1)
    out = trained(tmp_path / "run", *flags, status=2)
    last = last_line(out)
    assert last.startswith("error: step ")
    assert "loss nan" in last or "loss inf" in last
    assert "samples s" in last
    good = metrics(tmp_path / "run")
    assert all(np.isfinite(r["loss"]) for r in good)
    newest = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert newest == len(good)


@pytest.mark.slow
def test_a_run_with_other_settings_or_samples_is_refused(
    trained: Trained,
    single: Path,
    data: Path,
    tmp_path: Path,
    checkpoint: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    """The error names changed settings, weights and samples before any weight is loaded."""
    shutil.copytree(reference(trained, single) / "run", tmp_path / "run")
    shutil.copytree(data, tmp_path / "data")
    kept = (tmp_path / "run" / "lengths.json").read_bytes()

    def line(*flags: object, ck: Path = checkpoint) -> str:
        common = (
            "--checkpoint", ck, "--data", tmp_path / "data" / "eight.json", "--output", tmp_path / "run", *SHORT,
            "--max-frames", 4, "--compute-dtype", "float32", "--no-remat",
        )  # fmt: skip
        status, _, err = command(train.main, *common, *flags)
        assert status == 2, err
        assert (tmp_path / "run" / "lengths.json").read_bytes() == kept
        return last_line(err)

    assert "holds a run with other settings (epochs 2 -> 4, seed 0 -> 1)" in line("--epochs", 4, "--seed", 1)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += np.float32(1e-3)
    save_file(tensors, other / "model.safetensors")
    assert "holds a run with other settings (other weights in --checkpoint)" in line(ck=other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"version":', '"truncation": null, "version":', 1))
    (other / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    videos = tmp_path / "data"
    (videos / "0.mp4").write_bytes((videos / "1.mp4").read_bytes())
    (videos / "3.mp4").unlink()
    records = json.loads((videos / "eight.json").read_text())
    records.append({**records[1], "id": "new", "conversations": [
        {"from": "human", "value": QUESTION}, {"from": "gpt", "value": "New."}]})  # fmt: skip
    (videos / "eight.json").write_text(json.dumps(records))
    message = line(ck=other)
    assert (
        "the samples have changed since this run began: 2 vanished (s3, s7), 2 changed (s0, s4), 1 appeared (new)"
        in message
    )
    assert "restore them or choose another --output" in message
