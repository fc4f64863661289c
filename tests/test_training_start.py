"""train.py around its steps: the plan, refused flags, skipped samples, signals, locks and logs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from training_runs import board, last_line, metrics, rows, whole_checkpoints, write_data

import train
from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.testing import make_checkpoint
from xl2jax.training import batches
from xl2jax.training import run as run_module
from xl2jax.training.config import PRESETS as TRAINING
from xl2jax.training.processes import from_main, locked
from xl2jax.training.signals import Signals
from xl2jax.training.state import Checkpoints
from xl2jax.training.step import Metrics, TrainState
from xl2jax.training.telemetry import Telemetry


def test_all_processes_get_the_result_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes get the value, or all end with the error: none waits for one that has ended."""
    sent: list[Any] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for work, expected in ((lambda: ["some", {"value": 3}], ["some", {"value": 3}]), (lambda: None, None)):
        assert _of_both(monkeypatch, sent, work) == [expected, expected]

    def fails() -> None:
        raise UserError("no such place")

    assert [str(e) for e in _of_both(monkeypatch, sent, fails)] == ["no such place"] * 2


def _of_both(monkeypatch: pytest.MonkeyPatch, sent: list[Any], work: Callable[[], Any]) -> list[Any]:
    """The results of `from_main` in the first process, and in the second, which receives what the first sent."""
    results = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)

        def exchanged(x: Any, index: int = index) -> Any:
            if index == 0:
                sent.append(x)
                return x
            first = sent.pop(0)
            assert np.shape(x) == np.shape(first)
            return first

        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", exchanged)
        try:
            results.append(from_main(work if index == 0 else lambda: pytest.fail("only the first may work")))
        except UserError as e:
            results.append(e)
    return results


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_dry_run_reads_no_weights_and_no_media(
    tmp_path: Path, checkpoint: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "d.json").write_text(json.dumps(rows()))  # the videos do not exist
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
    broken = [*rows(), {**rows()[0], "id": "x", "video": "broken.mp4"}, {**rows()[0], "id": "y", "video": "none.mp4"},
              {**rows()[0], "id": "z", "video": ""}]  # fmt: skip
    (data / "some.json").write_text(json.dumps(broken))
    flags = ("--checkpoint", checkpoint, "--data", data / "some.json", "--output", tmp_path / "o", "--global-batch", 1)
    status, out, _ = command(train.main, *flags, "--validate-data")
    assert status == 1
    assert "sample x: " in out
    assert "sample y: " in out
    assert "record 6 (id z): video: should be the name of a file" in out
    assert "1 malformed records" in out
    assert "4 can be used, 2 cannot" in out
    (data / "some.json").unlink()
    (data / "broken.mp4").unlink()


def test_refusals(data: Path, tmp_path: Path, checkpoint: Path, copied: Path, refused: Callable[..., str]) -> None:
    def refuse(*flags: object, ck: Path = checkpoint, file: Path = data / "four.json") -> str:
        # The plan may have been printed before, so only the last line of stderr counts.
        return refused(train.main, "--checkpoint", ck, "--data", file, "--output", tmp_path / "o", *flags)

    assert "no such file" in refuse(file=tmp_path / "none.yaml")
    assert "no such checkpoint folder" in refuse(ck=tmp_path / "none")
    assert "--global-batch must be 1 or more" in refuse("--global-batch", 0)
    assert "not a multiple of 3" in refuse("--global-batch", 4, "--micro-batch", 3)
    assert "must be given together" in refuse("--coordinator", "localhost:1")
    assert "PATTERN=RATE" in refuse("--rates", "vision")
    assert "matches no parameter" in refuse("--train", "vission.*")
    (tmp_path / "exists").mkdir()
    assert "already exists" in refuse("--export", tmp_path / "exists")
    (tmp_path / "file").write_text("")
    assert "cannot be created (Not a directory)" in refuse("--export", tmp_path / "file" / "deep" / "out")
    assert "cannot be created (File name too long)" in refuse("--export", tmp_path / ("x" * 300))
    if not os.access("/proc", os.W_OK):
        assert "/proc (not a folder that can be written to)" in refuse("--export", "/proc/out")
    assert "max frames must be a whole number from 4" in refuse("--max-frames", 3)


def test_refusals_after_the_plan(
    data: Path, tmp_path: Path, copied: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Errors that occur after the plan was printed."""

    def line(*flags: object, ck: Path = copied, file: Path = data / "four.json") -> str:
        status, _, err = command(
            train.main, "--checkpoint", ck, "--data", file, "--output", tmp_path / "o", "--global-batch", 4, *flags
        )
        assert status == 2
        assert "Traceback" not in err
        return err.strip().splitlines()[-1]

    (tmp_path / "gone.json").write_text(json.dumps(rows()))
    assert "no sample can be used" in line(file=tmp_path / "gone.json")
    make_checkpoint(tmp_path / "other", PRESETS["tiny"])
    (copied / "model.safetensors").unlink()
    assert "no safetensors file" in line()
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw | {"intermediate_size": 128}))
    assert "misshapen" in line(ck=tmp_path / "other")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in line("--output", tmp_path / "file" / "o")


def test_skipped_samples_are_reported_at_every_start(
    data: Path,
    tmp_path: Path,
    checkpoint: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Malformed and unreadable samples are named and skipped until they are repaired; with --strict they are errors."""
    (tmp_path / "data").mkdir()
    for i in (0, 1):
        shutil.copyfile(data / f"{i}.mp4", tmp_path / "data" / f"{i}.mp4")
    broken = [*rows(), {**rows()[0], "id": "empty", "video": ""}, {**rows()[0], "id": "root", "video": "."}]
    (tmp_path / "data" / "d.json").write_text(json.dumps(broken))
    seen = []
    monkeypatch.setattr(
        run_module, "_steps", lambda _, plan, samples, *rest: seen.append([x.record.id for x in samples])
    )

    def started(*flags: object) -> tuple[int, str]:
        status, _, err = command(
            train.main, "--checkpoint", checkpoint, "--data", tmp_path / "data" / "d.json", "--output", tmp_path / "o",
            "--global-batch", 1, "--max-frames", 4, *flags,
        )  # fmt: skip
        return status, err

    for _ in range(2):
        _, err = started()
        assert seen.pop() == ["s0", "s1"]
        for part in (
            "(id empty): video: should be",
            "sample root: ",
            "sample s2: ",
            "sample s3: ",
            "3.mp4: no such file",
        ):
            assert part in err
        assert "4 of 6 samples are skipped: 2 are malformed, 2 cannot be read" in err
    assert "--strict: 2 samples cannot be used: " in last_line(started("--strict")[1])
    (tmp_path / "data" / "d.json").write_text(json.dumps(broken[:4]))
    status, err = started("--strict")
    assert (status, seen) == (2, [])
    assert "--strict: 2 samples cannot be used: sample s2: " in last_line(err)
    for i in (2, 3):
        shutil.copyfile(data / f"{i}.mp4", tmp_path / "data" / f"{i}.mp4")
    _, err = started("--strict")
    assert seen.pop() == ["s0", "s1", "s2", "s3"]
    assert "skipped" not in err


def test_samples_that_fail_during_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The place of a file that vanished after the start stays empty; with --strict the run ends."""
    config = dataclasses.replace(TRAINING["stage4"], checkpoint="c", data=tmp_path, output=tmp_path)
    read = [{"failed": ["s1: gone.mp4: no such file"], "samples": ["s0"]}]
    step = run_module._Step(3, Metrics(*[jnp.float32(1)] * 4), read, 10, 1e9, 1e6)  # type: ignore[arg-type]
    with telemetry(tmp_path) as log:
        run_module._record(step, log, config)
        assert "skipped sample s1: gone.mp4: no such file (1 so far)" in caplog.text
        with pytest.raises(UserError, match="--strict: 1 samples cannot be used: sample s1: gone.mp4"):
            run_module._record(step, log, dataclasses.replace(config, strict=True))
    assert [row["step"] for row in metrics(tmp_path)] == [3]


def test_signals_are_noticed_in_callbacks() -> None:
    """Ctrl-C works in a callback whose exceptions Python drops. Afterwards the handlers are restored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        with Signals() as signals:
            assert not signals.stop_after(1)
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGINT)
            assert signals.stop_after(2)
            assert (signals.status, signals.name) == (130, "Ctrl-C")
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends the process
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.stop_after(1)
            assert (signals.status, signals.name) == (143, "SIGTERM")
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == before[1]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a background job of a shell
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert not signals.stop_after(1)
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_several_processes_agree_through_the_preemption_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's preemption service handles SIGTERM and is asked at every step; Ctrl-C is passed on to it."""
    queried: list[int] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: queried.append(n) or n == 3)
    terms: list[int] = []
    before = [signal.signal(signal.SIGINT, signal.default_int_handler)]
    before.append(signal.signal(signal.SIGTERM, lambda number, _: terms.append(number)))
    try:
        with Signals() as signals:
            assert not signals.stop_after(1)
            signal.raise_signal(signal.SIGINT)
            assert terms == [signal.SIGTERM]
            assert not signals.stop_after(2)
            assert signals.stop_after(3)
            assert signals.status == 130
        assert queried == [1, 2, 3]
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_ctrl_c_before_the_first_step(
    data: Path,
    tmp_path: Path,
    checkpoint: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal while the data is measured gives one line, and releases the folder."""
    presses = iter([signal.SIGINT])
    monkeypatch.setattr(batches, "open_media", lambda *x: [signal.raise_signal(n) for n in presses])
    flags = ("--checkpoint", checkpoint, "--data", data / "four.json", "--output", tmp_path / "o", "--global-batch", 4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, _, err = command(train.main, *flags)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert last_line(err) == "interrupted"
    with locked(tmp_path / "o"):
        pass


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    with locked(tmp_path / "o"):
        line = re.escape(f"another run uses this folder (process {os.getpid()} on ")
        with pytest.raises(UserError, match=line), locked(tmp_path / "o"):
            pass
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path\n"
         "from xl2jax.training.processes import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", str(tmp_path / "o")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on "), locked(tmp_path / "o"):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path / "o"):
        pass
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "o", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be written"), locked(place):
            pass


def telemetry(output: Path, first: int = 0) -> Telemetry:
    return Telemetry(output, 9, first, show=True, tensorboard=True, wandb=None, config={})


def test_logs_resume_from_the_checkpoint(tmp_path: Path) -> None:
    """Later steps are removed from both logs, and so are incomplete and foreign rows."""
    with telemetry(tmp_path) as log:
        for step in range(1, 5):
            log.step(step, {"loss": float(step), "learning_rate": 0.1, "grad_norm": 1.0}, 10, 1e9)
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(b'[]\n{"step": "x"}\n\xff\n{"step": 2')
    with telemetry(tmp_path, first=2) as log:
        log.step(3, {"loss": 7.0, "learning_rate": 0.1, "grad_norm": 1.0}, 10, 1e9)
    assert [(r["step"], r["loss"]) for r in metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    loss = {step: value for (name, step), value in board(tmp_path / "tensorboard").items() if name == "train/loss"}
    assert loss == {1: 1.0, 2: 2.0, 3: 7.0}


@pytest.mark.parametrize("log", ["metrics", "board"])
def test_a_full_disk_for_the_logs_gives_one_line(tmp_path: Path, log: str) -> None:
    """A step that cannot be logged raises an error at once; nothing waits in another thread."""
    with telemetry(tmp_path) as t:
        if log == "metrics":
            t._file.close()
            t._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        else:
            t._board._file.close()
            t._board._file = open("/dev/full", "wb")  # noqa: SIM115
        with pytest.raises(UserError, match="the log cannot be written .No space left on device"):
            t.step(1, {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, 10, 1e9)


def test_a_checkpoint_without_disk_space_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(jnp.int32(1), {"a": jnp.ones((1000,))}, {"m": jnp.ones((1000,))})  # type: ignore[arg-type]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.identity() is None
        checkpoints.save(state, {"k": "v"})
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8003))
        with pytest.raises(UserError, match="a checkpoint needs 0.000 GB, 0.000 GB are free"):
            checkpoints.save(state._replace(step=jnp.int32(2)), {"k": "v"})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8004))
        checkpoints.save(state._replace(step=jnp.int32(2)), {"k": "w"})
    assert whole_checkpoints(tmp_path) == [1, 2]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert (checkpoints.latest, checkpoints.identity()) == (2, {"k": "w"})
    (tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"k": [1]}}')
    with (
        pytest.raises(UserError, match="2: .*remove it to resume from the checkpoint before"),
        Checkpoints(tmp_path, 2) as checkpoints,
    ):
        checkpoints.identity()
