"""Cache files are read back as they were saved, or refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import damaged, outcome
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import xl2jax
from xl2jax.checkpoint import safetensors_io
from xl2jax.checkpoint.array_checks import checksum
from xl2jax.commands import infer
from xl2jax.errors import UserError
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.store import cache_key, check_cache_file, load_cache, save_cache
from xl2jax.inference.video_cache import CacheConfig

AGAIN = "remove the file, and watch the video again"


@pytest.fixture(scope="module")
def key(model: xl2jax.Model, clip: Path) -> dict[str, Any]:
    return cache_key(model, clip, xl2jax.FrameSampling(), 1.0, xl2jax.PrefillConfig(), CacheConfig())


@pytest.fixture(scope="module")
def saved(watched: xl2jax.WatchedVideo, key: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache file, which tests only read."""
    path = tmp_path_factory.mktemp("cache") / "video.cache"
    save_cache(path, watched, key)
    return path


@pytest.fixture
def load(
    model: xl2jax.Model, clip: Path, key: dict[str, Any], tmp_path: Path
) -> Callable[[bytes], xl2jax.WatchedVideo]:
    """Reads a cache from bytes."""

    def read(data: bytes) -> xl2jax.WatchedVideo:
        (tmp_path / "video.cache").write_bytes(data)
        return load_cache(tmp_path / "video.cache", model, key, clip, BilevelConfig())

    return read


def filled(video: xl2jax.WatchedVideo) -> list[np.ndarray]:
    """The filled slots of keys and values."""
    cache = video.kv.cache
    ends = (0, int(cache.global_length)), (int(cache.visual_start), int(cache.visual_start + cache.visual_length))
    return [np.asarray(x)[:, :, slice(*part)] for x in (cache.k, cache.v) for part in ends]


def same(a: xl2jax.WatchedVideo, b: xl2jax.WatchedVideo) -> bool:
    values = zip(filled(a), filled(b), strict=True)
    return a.kv.layout == b.kv.layout and a.times == b.times and all(x.tobytes() == y.tobytes() for x, y in values)


def test_float16(checkpoint: Path, watched: xl2jax.WatchedVideo, clip: Path, tmp_path: Path) -> None:
    model = xl2jax.load(checkpoint, dtype="float16")
    k, v = (x.astype(np.float16) for x in (watched.kv.cache.k, watched.kv.cache.v))
    video = dataclasses.replace(watched, kv=dataclasses.replace(watched.kv, cache=watched.kv.cache._replace(k=k, v=v)))
    key = {"dtype": "float16", "prefill": dataclasses.asdict(xl2jax.PrefillConfig())}
    save_cache(tmp_path / "cache", video, key)
    again = load_cache(tmp_path / "cache", model, key, clip, BilevelConfig())
    assert again.kv.cache.k.dtype == np.float16
    assert same(again, video)


def header_size(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, np.ndarray]], Any]) -> bytes:
    """The file with other contents and right checksums."""
    with safe_open(path, framework="np") as f:
        metadata, names = f.metadata(), f.offset_keys()
    stored = load_file(path)
    tensors = {n: stored[n] for n in names}
    change(metadata, tensors)
    tensors["checksums"] = np.zeros((len(tensors), 16), np.int8)
    items = [
        (n, x.shape, next(c for c, d in safetensors_io.DTYPES.items() if d == x.dtype)) for n, x in tensors.items()
    ]
    out = path.with_name("rewritten")
    with safetensors_io.ShardWriter(out, items, metadata) as writer:
        sums = [checksum(np.frombuffer(writer.header, np.uint8))]
        sums += [checksum(x) for n, x in tensors.items() if n != "checksums"]
        for n, x in tensors.items():
            rows = np.array([list(bytes.fromhex(s)) for s in sums], np.uint8).view(np.int8)
            writer.write(n, rows if n == "checksums" else x)
    return out.read_bytes()


def test_what_is_saved_is_read_back(
    saved: Path, load: Callable[[bytes], xl2jax.WatchedVideo], watched: xl2jax.WatchedVideo
) -> None:
    assert same(load(saved.read_bytes()), watched)
    assert same(load(rewritten(saved, lambda *_: None)), watched)


def test_every_flipped_bit_is_refused(saved: Path, load: Callable[[bytes], Any]) -> None:
    data = saved.read_bytes()
    rng, head = random.Random(0), header_size(data)
    places = [rng.randrange(head) for _ in range(46)] + [rng.randrange(head, len(data)) for _ in range(46)]
    for place in [*places, head, len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        video, _ = outcome(lambda changed=changed: load(bytes(changed)))
        assert video is None, place


def test_numbers_put_into_the_file_are_refused(saved: Path, load: Callable[[bytes], Any]) -> None:
    data = saved.read_bytes()
    rng, head = random.Random(1), header_size(data)
    for _ in range(20):
        place = head + 4 * rng.randrange((len(data) - head) // 4)
        changed = data[:place] + struct.pack("<f", float("nan")) + data[place + 4 :]
        with pytest.raises(
            UserError, match=f"cannot be used .the checksum of .*: {AGAIN}|its checksums are incomplete"
        ):
            load(changed)


def test_fuzzed_cache_files(
    saved: Path, load: Callable[[bytes], xl2jax.WatchedVideo], watched: xl2jax.WatchedVideo
) -> None:
    data = saved.read_bytes()
    head = header_size(data)
    for seed in range(100):
        rng = random.Random(seed)
        changed = damaged(data, rng) if rng.random() < 0.5 else damaged(data[:head], rng) + data[head:]
        video, _ = outcome(lambda changed=changed: load(changed))
        assert video is None or changed == data or same(video, watched)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "video: duration: is missing; times: is missing"),
        ([], "should be an object"),
        ({"duration": -1, "times": [0.0] * 148}, "duration: should be greater than or equal to 0, not -1"),
        ({"duration": 1e999, "times": [0.0] * 148}, "not JSON"),
        ({"duration": 1, "times": []}, "times"),
        ({"duration": 1, "times": [0.0, 1.0, 2.0]}, "times"),
        ({"duration": 1, "times": [0.0] * 5}, "should hold whole groups of 4 frames"),
        ({"duration": 1, "times": ["0"] * 4}, "times.0: should be a valid number"),
        ({"duration": 1, "times": [0.0] * 4}, "its tensors do not match its description of the video"),
        ({"duration": 1, "times": [10.0**300] * 148}, "its tensors do not match its description of the video"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_edited_metadata(about: Any, message: str, saved: Path, load: Callable[[bytes], Any]) -> None:
    text = about if isinstance(about, str) else json.dumps(about)
    data = rewritten(saved, lambda metadata, _: metadata.update(video=text))
    with pytest.raises(UserError, match=message) as e:
        load(data)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        lambda _, t: t.pop("v.visual.1"),
        lambda _, t: t.pop("k.visual.1"),
        lambda _, t: t.update({"k.visual.1": t["k.visual.1"][:, :-1].copy()}),
        lambda _, t: t.update({"k.visual.1": t["k.visual.1"].astype(np.float16)}),
        lambda _, t: t.update({"more": t.pop("k.visual.1")}),
    ],
)
def test_edited_tensors(change: Callable[..., Any], saved: Path, load: Callable[[bytes], Any]) -> None:
    with pytest.raises(UserError, match="its tensors do not match its description of the video"):
        load(rewritten(saved, change))


@pytest.mark.parametrize("metadata_key", ["key", "video"])
def test_metadata_that_is_missing(metadata_key: str, saved: Path, load: Callable[[bytes], Any]) -> None:
    with pytest.raises(UserError, match=f"{metadata_key}: not JSON"):
        load(rewritten(saved, lambda metadata, _: metadata.pop(metadata_key)))


def test_files_that_are_no_cache_of_this_version(saved: Path, tmp_path: Path) -> None:
    old = rewritten(saved, lambda metadata, _: metadata.update(format="xl2jax video cache 1"))
    path = tmp_path / "old"
    path.write_bytes(old)
    with pytest.raises(UserError, match=f"made by an earlier version.: {AGAIN}"):
        check_cache_file(path)
    save_file({"x": np.zeros(2, np.float32)}, path)
    with pytest.raises(UserError, match="not a video cache of this version"):
        check_cache_file(path)
    save_file({"checksums": np.zeros(2, np.float32)}, path, {"format": "xl2jax video cache 3"})
    with pytest.raises(UserError, match="its checksums are incomplete"):
        check_cache_file(path)
    save_file({"x": np.zeros(2, np.float32)}, path, {"format": "xl2jax video cache 3"})
    with pytest.raises(UserError, match=AGAIN):
        check_cache_file(path)
    path.unlink()
    for make, message in (
        (lambda: None, "no such file"),
        (lambda: os.mkfifo(path), "is a pipe or a device"),
        (lambda: (path.unlink(), path.mkdir()), "is a folder, not a regular file"),
    ):
        make()
        with pytest.raises(UserError, match=message):
            check_cache_file(path)


def test_a_full_disk_and_what_was_there(
    saved: Path, watched: xl2jax.WatchedVideo, key: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "video.cache").write_text("old")
    monkeypatch.setattr(safetensors_io.ShardWriter, "write", full)
    with pytest.raises(UserError, match="video.cache: no space left on the disk; nothing was kept"):
        save_cache(tmp_path / "video.cache", watched, key)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("video.cache", "old")]


def test_two_that_save_to_one_file(
    saved: Path, watched: xl2jax.WatchedVideo, key: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first is writing. The file is complete whichever finishes last."""
    path, write = tmp_path / "video.cache", safetensors_io.ShardWriter.write

    def other_first(*args: Any) -> None:
        monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)
        save_cache(path, watched, key)
        write(*args)

    monkeypatch.setattr(safetensors_io.ShardWriter, "write", other_first)
    save_cache(path, watched, key)
    assert path.read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["video.cache"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cache", "{0}"), "is a folder, not a regular file"),
        (("--cache", "{0}/none/x"), "cannot be written (no such folder)"),
        (("--cache", "{0}/pipe"), "is a pipe or a device"),
        (("--cache", "/dev/null"), "is a pipe or a device"),
        (("--cache", "/proc/x"), "cannot be written"),
        (("--plot", "{0}"), "is a folder, not a file; choose another name"),
        (("--cache", "{0}/other"), "not a complete video cache"),
    ],
)
def test_targets_and_sources_are_checked_before_anything_is_loaded(
    flags: tuple[str, str],
    message: str,
    clip: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xl2jax, "load", None)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other").write_text("x")
    path = flags[1].format(tmp_path)
    line = refused(infer.main, "--video", clip, "--checkpoint", "x", "--question", "What?", flags[0], path)
    assert line.startswith(path)
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "pipe"]
