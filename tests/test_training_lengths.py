"""Fingerprints and stored lengths depend on the contents of files, not on their names or folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from training_runs import turns

from xl2jax.commands.convert import main as convert
from xl2jax.config import PRESETS
from xl2jax.testing import make_checkpoint
from xl2jax.training.batches import Length, Probe
from xl2jax.training.fingerprint import media_fingerprint, weights_fingerprint
from xl2jax.training.lengths import Lengths, Measured, differences, measure, read_lengths, samples_digest, write_lengths
from xl2jax.training.records import Record, read_records


def test_media_fingerprints_depend_on_content(tmp_path: Path) -> None:
    """Names, folders and times do not matter. A changed byte, a replaced frame and a cut file are noticed."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    shutil.copyfile(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b", (1, 1))
    print_of = media_fingerprint(tmp_path / "a")
    assert media_fingerprint(tmp_path / "b") == print_of
    data = bytearray((tmp_path / "a").read_bytes())
    data[5000] ^= 1
    (tmp_path / "b").write_bytes(data)
    assert media_fingerprint(tmp_path / "b") != print_of
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:-1])
    assert media_fingerprint(tmp_path / "b") != print_of
    big = tmp_path / "big"
    big.write_bytes(bytes(5_000_000))
    before = media_fingerprint(big)
    big.write_bytes(bytes(5_000_001))
    assert media_fingerprint(big) != before
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(3):
        (frames / f"{i}.png").write_bytes(bytes([i]) * 9)
    before = media_fingerprint(frames)
    assert media_fingerprint(Path(shutil.copytree(frames, tmp_path / "copy"))) == before
    (frames / "1.png").write_bytes(b"\7" * 9)
    assert media_fingerprint(frames) != before


def test_weights_fingerprints_depend_on_content(
    checkpoint: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """A copy and other shards have the same fingerprint; one trained layer or another seed changes it."""
    before = weights_fingerprint(checkpoint)
    assert weights_fingerprint(Path(shutil.copytree(checkpoint, tmp_path / "copy"))) == before
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, part in enumerate((names[:50], names[50:])):
        save_file({n: tensors[n] for n in part}, shards / f"part-{number}.safetensors")
    assert weights_fingerprint(shards) == before
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name] + np.float32(1e-5)
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    assert weights_fingerprint(tmp_path / "copy") != before
    make_checkpoint(tmp_path / "other", PRESETS["tiny"], seed=1)
    assert weights_fingerprint(tmp_path / "other") != before
    for name in ("orbax", "again", "trained"):
        source = tmp_path / "copy" if name == "trained" else checkpoint
        assert command(convert, source, tmp_path / name)[0] == 0
    orbax = weights_fingerprint(tmp_path / "orbax")
    assert weights_fingerprint(tmp_path / "again") == orbax
    assert weights_fingerprint(tmp_path / "trained") != orbax
    for name in ("orbax", "trained"):  # as an earlier version wrote them
        manifest = json.loads((tmp_path / name / "xl2jax.json").read_text())
        (tmp_path / name / "xl2jax.json").write_text(json.dumps({"format": 1, "dtype": manifest["dtype"]}))
    old = weights_fingerprint(tmp_path / "orbax")
    assert old != weights_fingerprint(tmp_path / "trained")
    (tmp_path / "orbax").rename(tmp_path / "moved")
    assert weights_fingerprint(tmp_path / "moved") == old


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Three files and a text. For `measuring`, a file that begins with `bad` cannot be read."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 10)
    rows = [{"id": n, "video": n, "conversations": turns("<image>", n)} for n in "abc"]
    (folder / "d.json").write_text(json.dumps([*rows, {"id": "text", "conversations": turns("a", "b")}]))
    return folder


@pytest.fixture
def measuring(tmp_path: Path) -> Callable[[Path], tuple[Measured, list[str]]]:
    """Starts a run on the data of a folder. Returns the measurement, and the samples that it had to open."""
    output = tmp_path / "out"
    output.mkdir()

    def start(folder: Path, setting: str = "s") -> tuple[Measured, list[str]]:
        opened: list[str] = []

        def probe(records: list[Record]) -> Probe:
            lengths: list[Length | None] = []
            for r in records:
                opened.append(r.id)
                data = b"text" if r.media is None else r.media.read_bytes()
                lengths.append(None if data.startswith(b"bad") else Length(1, len(data)))
            bad = {i: "no video" for i, x in enumerate(lengths) if x is None}
            return Probe(tuple(lengths), bad, frozenset(i for i, x in enumerate(lengths) if x and x.tokens > 50))

        records = read_records(folder / "d.json", 0).records
        got = measure(records, setting, read_lengths(output), probe, 2)
        write_lengths(output, got.stored)
        return got, opened

    return start


type Measuring = Callable[..., tuple[Measured, list[str]]]


def test_lengths_are_stored_by_content(media: Path, measuring: Measuring) -> None:
    first, opened = measuring(media)
    assert opened == ["a", "b", "c", "text"]
    assert [x.record.id for x in first.samples] == opened
    again, opened = measuring(media)
    assert opened == []
    assert samples_digest(again.samples) == samples_digest(first.samples)
    moved = Path(shutil.copytree(media, media.with_name("elsewhere")))
    shutil.rmtree(media)
    again, opened = measuring(moved)
    assert opened == []
    assert samples_digest(again.samples) == samples_digest(first.samples)
    relative, opened = measuring(Path(os.path.relpath(moved)))
    assert opened == []
    assert samples_digest(relative.samples) == samples_digest(first.samples)
    assert measuring(moved, "other sampling")[1] == ["a", "b", "c", "text"]


def test_unusable_samples_are_tried_again_at_each_start(media: Path, measuring: Measuring) -> None:
    """Files that were missing or unreadable are measured when they are restored: only usable samples are stored."""
    kept = (media / "b").read_bytes()
    (media / "b").unlink()
    (media / "c").write_bytes(b"bad")
    for _ in range(2):
        got, opened = measuring(media)
        assert [x.record.id for x in got.samples] == ["a", "text"]
        assert got.problems == [f"sample b: {media / 'b'}: no such file", "sample c: no video"]
        assert "c" in opened
    (media / "b").write_bytes(kept)
    (media / "c").write_bytes(b"c" * 60)
    got, opened = measuring(media)
    assert (opened, got.problems, got.cut) == (["b", "c"], [], 1)
    assert [x.record.id for x in got.samples] == ["a", "b", "c", "text"]
    assert measuring(media)[0].cut == 1


def test_a_replaced_file_is_measured_again(media: Path, measuring: Measuring) -> None:
    """The new file has the same name, size and time. The message names all samples that changed."""
    before, _ = measuring(media)
    times = (media / "b").stat()
    (media / "new").write_bytes(b"B" * 10)
    os.utime(media / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    (media / "new").rename(media / "b")
    (media / "a").unlink()
    rows = json.loads((media / "d.json").read_text())
    rows.append({"id": "more", "conversations": turns("x", "y")})
    (media / "d.json").write_text(json.dumps(rows))
    now, opened = measuring(media)
    assert opened == ["b", "more"]
    assert differences(before.stored, now.stored) == "1 vanished (a), 1 changed (b), 1 appeared (more)"
    assert samples_digest(before.samples) != samples_digest(now.samples)
    (media / "d.json").write_text(json.dumps(rows[::-1]))
    turned, _ = measuring(media)
    assert differences(now.stored, turned.stored) == "their order changed"
    assert samples_digest(turned.samples) != samples_digest(now.samples)


@pytest.mark.parametrize("damage", ["", "[]", '{"settings": 3}', '{"settings": "s", "media": {}, "samples": [[1]]}'])
def test_damaged_lengths_are_measured_again(
    media: Path, measuring: Measuring, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = media.with_name("out") / "lengths.json"
    measuring(media)
    whole = json.loads(file.read_text())
    file.write_text(damage)
    assert measuring(media)[1] == ["a", "b", "c", "text"]
    assert "all samples are measured again" in caplog.text
    assert json.loads(file.read_text()) == whole
    assert Lengths.model_validate(whole)
