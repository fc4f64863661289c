from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xl2jax.bench import cards as bench_cards
from xl2jax.bench import command as bench
from xl2jax.bench import matrices
from xl2jax.bench import train as bench_train
from xl2jax.bench.e2e import E2EArgs
from xl2jax.bench.file import file_row, plot_rows
from xl2jax.bench.read import write_long
from xl2jax.config import PRESETS
from xl2jax.errors import UserError
from xl2jax.inference import flops
from xl2jax.inference.layout import PrefillConfig, VideoLayout, dense_mask
from xl2jax.models.video_xl2 import abstract_model
from xl2jax.video.clip import PyAVReader


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs rows in this process, since processes of their own would import and compile everything anew."""

    def row(command: str, args: object, mode: str, size: int) -> dict[str, Any]:
        kind, function = bench.ROWS[command]
        return function(bench.restored(kind, dataclasses.asdict(args)), mode, size)  # type: ignore[call-overload]

    monkeypatch.setattr(bench, "_in_own_process", row)


def test_a_row_in_its_own_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    args = bench.ReadArgs(video=tmp_path / "none.mp4")
    with pytest.raises(UserError, match="bench read ours of size 4 failed"):
        bench._in_own_process("read", args, "ours", 4)


@pytest.mark.slow
def test_rows(command: Callable[..., tuple[int, str, str]]) -> None:
    """Both benchmarks of the LLM have their fields at the smallest preset."""
    status, out, err = command(bench.main, "prefill", "--preset", "tiny", "--groups", "9", "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert [(r["mode"], r["groups"], r["tokens"]) for r in rows] == [
        ("chunked", 9, 14 + 9 * 13),
        ("dense", 9, 14 + 9 * 13),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert {"compile_seconds", "tokens_per_s", "peak_memory_bytes"} <= row.keys()
    status, out, err = command(
        bench.main, "decode", "--preset", "tiny", "--groups", "24", "--modes", "bilevel", "--json"
    )
    assert status == 0, err
    (row,) = json.loads(out)
    # Of 6 chunks the first, the last and the best two are dense. The other two, of 4 groups, keep 1 of 4 visual tokens.
    assert row["context_tokens"] == row["tokens"] - 2 * 4 * 3
    assert row["step_ms"] > 0


@pytest.mark.slow
def test_e2e(command: Callable[..., tuple[int, str, str]]) -> None:
    """Times every stage of the whole model at the smallest preset, in the dtype that is the default on GPUs."""
    status, out, err = command(bench.main, "e2e", "--preset", "tiny", "--frames", "96", "--step-groups", "4", "--json")
    assert status == 0, err
    card, *rows = json.loads(out)["rows"]
    checks, (vision, *videos) = rows[:5], rows[5:]
    assert all(1e-4 < c["relative_l2"] < 0.1 for c in checks[:3])  # bfloat16, random weights
    assert all(c["relative_l2"] < 1e-2 for c in checks[3:])
    assert card["matrix_tflops"] > 0
    assert min(vision["tower_frames_s"], vision["frames_s"]) > 0
    assert [(v["frames"], v["tokens"]) for v in videos] == [(96, 14 + 24 * 13)]
    # Of 6 chunks the first, the last and the best two are dense.
    assert videos[0]["bilevel_tokens"] == videos[0]["dense_tokens"] - 2 * 4 * 3
    for v in videos:
        assert (
            min(
                v[k]
                for k in (
                    "prefill_s",
                    "pixels_to_first_token_s",
                    "dense_step_ms",
                    "bilevel_step_ms",
                    "question_s",
                    "peak_gib",
                    "dense_prefill_s",
                )
            )
            > 0
        )


@pytest.mark.slow
def test_train(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    flags = ("--preset", "tiny", "--frames", "4", "--steps", "1", "--train", "lora+projector", "--save", tmp_path)
    status, out, err = command(bench.main, "train", *flags, "--json")
    assert status == 0, err
    _, row, saved = json.loads(out)["rows"]
    assert (saved["saved_step"], saved["devices"], saved["resumed_on"], saved["same_bits"]) == (2, 1, 1, True)
    assert saved["next_loss_resumed"] == pytest.approx(saved["next_loss"], rel=1e-6)
    assert saved["saved_gb"] > 0
    assert not list(tmp_path.iterdir())
    assert (row["frames"], row["rows"], row["mesh"]) == (4, 1, "1x1x1")
    assert min(row[k] for k in ("step_s", "tokens_per_s", "tflops_per_device", "loss_last", "peak_gib")) > 0


def test_read(tmp_path: Path, command: Callable[..., tuple[int, str, str]], refused: Callable[..., str]) -> None:
    """A video made of repeated pieces is read to its end."""
    path = tmp_path / "long.mp4"
    write_long(path, 45, 64, 48)
    reader = PyAVReader(path)
    assert reader.total == 60 * 24  # whole pieces of 20 seconds
    assert reader.fps == 24
    first, again = reader.frames(np.array([30, 30 + 480]))
    assert np.array_equal(first, again)
    status, out, err = command(
        bench.main, "read", "--video", path, "--frames", "40", "--size", "32", "--modes", "decord,overlap", "--json"
    )
    assert status == 0, err
    rows = json.loads(out)
    assert [(r["mode"], r["frames"]) for r in rows] == [(m, 40) for m in ("decord", "overlap")]
    assert all(r["seconds"] > 0 for r in rows)
    assert "--synthetic" in refused(bench.main, "read", "--synthetic", "1h")
    assert "--modes" in refused(bench.main, "read", "--modes", "fast")
    assert "no such video" in refused(bench.main, "read", "--video", tmp_path / "none.mp4")


@pytest.mark.slow
def test_a_file_from_reading_to_the_answer(
    checkpoint: Path, clip: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    args = E2EArgs(video=clip, checkpoint=str(checkpoint), dtype="float32", cache_dtype="int8", offload=True)
    row = file_row(args, "watch", 28)
    assert row["frames"] == 28
    computing = row["vision_s"] + row["prefill_s"] - row["compile_s"]
    assert row["overlap"] == (row["seconds"] - row["compile_s"]) / max(row["read_alone_s"], computing)
    assert row["seconds"] >= row["read_wait_s"] + row["vision_s"] + row["prefill_s"]
    plot_rows(tmp_path / "p.png", [row])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "--plot needs --video" in refused(bench.main, "e2e", "--plot", tmp_path / "q.png")
    assert "--preset has no effect" in refused(bench.main, "e2e", "--video", clip, "--preset", "tiny")
    assert "no such video" in refused(bench.main, "e2e", "--video", tmp_path / "none.mp4")
    assert "--synthetic" in refused(bench.main, "e2e", "--synthetic", "1h@99p")


def test_flops() -> None:
    """Counts agree with the compiler's count and with the mask rule that is written out."""
    config = PRESETS["tiny"]
    model = abstract_model(config, jnp.float32)

    def counted(f: Callable[..., object], *args: object) -> float:
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    frames = jax.ShapeDtypeStruct((4, 70, 70, 3), jnp.float32)
    whole = counted(lambda m, x: m.encode_frames(x), model, frames)
    # The compiler counts the body of a scan once, and also counts softmax and norms.
    layers = config.vision.run_layers
    once = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=2))
    expected = 4 * flops.vision(once) + flops.dts_and_projector(config)
    assert layers == 2
    assert 0.7 * whole < expected < whole
    layout = VideoLayout(5, (2, 3, 2, 3, 2), 4)
    for prefill in (PrefillConfig(2, 1), PrefillConfig(2, None)):
        assert flops.visible_pairs(layout, prefill, suffix=3) == dense_mask(layout, 3, prefill).sum()


@pytest.mark.slow
def test_products_in_fewer_bits_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_PAIRS", 1)
    rows = list(matrices.matrix_rows(100.0, 256, 512))
    assert [(row["weights"], row["tokens"]) for row in rows] == [
        (weights, tokens) for weights in ("bfloat16", "int8", "int4") for tokens in (1, 16)
    ]
    assert all(0 < row["relative_l2"] < 5e-3 and row["us"] > 0 for row in rows)


def test_bad_options(refused: Callable[..., str]) -> None:
    assert "--groups" in refused(bench.main, "prefill", "--groups", "many")
    assert "--modes" in refused(bench.main, "decode", "--modes", "chunked")
    assert "--preset" in refused(bench.main, "prefill", "--preset", "huge")
    assert "must be a whole number from 1" in refused(bench.main, "prefill", "--chunk-groups", "0")
    assert "--frames" in refused(bench.main, "e2e", "--frames", "30")
    for name in ("prefill", "decode", "e2e"):
        assert "attention 'foo': choose auto" in refused(bench.main, name, "--attention", "foo")
    assert "--size must be" in refused(bench.main, "read", "--size", 0)
    assert "--profile must be" in refused(bench.main, "e2e", "--profile", -1)
    assert "--fps must be above 0" in refused(bench.main, "e2e", "--fps", "nan")
    assert "no such folder" in refused(bench.main, "e2e", "--plot", "none/x.png")
    assert "needs a GPU" in refused(bench.main, "kernels")
    assert "cannot be trained" in refused(bench.main, "train", "--train", "all", "--weights", "int8")
    assert "no such folder" in refused(bench.main, "train", "--save", "/nowhere")
    for flag, value in (("--answer-tokens", 0), ("--lora-rank", 0), ("--lora-rank", -3)):
        assert f"{flag} must be" in refused(bench.main, "train", "--preset", "tiny", flag, value)
    assert "goes with --parts train" in refused(bench.main, "cards", "--save", ".")
    assert "--profile must be" in refused(bench.main, "cards", "--profile", -1)
    train = ("cards", "--parts", "train")
    assert "cannot be trained" in refused(bench.main, *train, "--train", "all", "--weights", "int8")


def test_training_is_timed_only_as_train_divides_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest preset has 2 KV heads. Nothing is timed before a refusal."""
    monkeypatch.setattr(bench_train, "ceilings", lambda: pytest.fail("began"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="--tensor 4 does not divide 2 KV heads"):
        next(bench_train.train_rows(bench_train.TrainBenchArgs(preset="tiny", tensor=4)))
    with pytest.raises(UserError, match="--fsdp 2 with --tensor 1 does not divide 1 devices"):
        next(bench_train.train_rows(bench_train.TrainBenchArgs(preset="tiny", fsdp=2, devices=1)))


def test_half_of_a_mesh_takes_the_whole_batch() -> None:
    assert bench_train.halved(1, 1, 1) == (1, 1, 1)
    for mesh in itertools.product(range(1, 7), repeat=3):
        if math.prod(mesh) % 2:
            continue
        half = bench_train.halved(*mesh)
        assert 2 * math.prod(half) == math.prod(mesh)
        assert (mesh[0] * mesh[1]) % (half[0] * half[1]) == 0
    for mesh in ((3, 1, 1), (1, 5, 1), (1, 3, 3)):
        with pytest.raises(UserError, match="is odd"):
            bench_train.halved(*mesh)


def test_a_fault_of_the_device_is_not_called_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(failure: str) -> list[dict[str, Any]]:
        def fails(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
            raise jax.errors.JaxRuntimeError(failure)
            yield {}

        monkeypatch.setattr(bench_cards, "train_rows", fails)
        return list(bench_cards._train_rows(bench_cards.CardsArgs(parts="train"), [1]))

    assert [row["left_out"] for row in rows("RESOURCE_EXHAUSTED: Out of memory")] == ["training does not fit"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="NCCL"):
        rows("INTERNAL: NCCL operation failed")


@pytest.mark.slow
def test_live(command: Callable[..., tuple[int, str, str]]) -> None:
    """The stages in their order; what is timed compiles nothing."""
    flags = ("--preset", "tiny", "--dtype", "float32", "--dense-minutes", 0.1, "--minutes", 4, "--tokens", 2)
    flags += ("--seconds", 2, "--every", 0.5, "--rate", 20, "--questions", 3, "--json")
    status, out, err = command(bench.main, "live", *flags)
    assert status == 0, err
    full, flat_out, steady, finished, file = json.loads(out)["rows"]
    assert [row["stage"] for row in (full, flat_out, steady, finished, file)] == [
        "full", "flat out", "steady", "finished", "file",
    ]  # fmt: skip
    assert full["frames"] == 4 * (360 // 4 + 1)
    assert flat_out["answers"] >= 1
    assert steady["frames_s"] == pytest.approx(20, rel=0.3)
    assert steady["answers"] == 3
    assert finished["ratio"] == pytest.approx(steady["first_token_s"] / finished["first_token_s"])
    assert full["programs"] == flat_out["programs"] == steady["programs"] == finished["programs"]
    assert file["frames"] == 240
    status, _, err = command(bench.main, "live", "--rate", 0)
    assert status == 2
    assert "--rate must be above 0" in err
