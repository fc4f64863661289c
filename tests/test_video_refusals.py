"""Files that are no videos are refused with one line. Damaged videos are read as far as possible, or refused."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from odd_videos import BY_SUFFIX, KINDS, Kind, constant, packets, write_recorder_webm, write_video
from PIL import Image

from xl2jax.errors import UserError
from xl2jax.video import containers
from xl2jax.video.clip import open_video
from xl2jax.video.frame_sampling import FrameSampling
from xl2jax.video.readers import PyAVReader

ALL = FrameSampling(fps=25, max_fps=None)


def refusal(path: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        open_video(path, **options).check()
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("plain") / "plain.mp4", constant(50), BY_SUFFIX["mp4"])


def test_a_pipe_a_device_a_socket(tmp_path: Path) -> None:
    """They are not opened: a pipe without a writer would block for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "pipe.mp4: is a pipe, a device or a socket" in refusal(tmp_path / "pipe.mp4")
    assert "/dev/zero: is a pipe, a device or a socket" in refusal("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):  # the name of a socket must be short
        server.bind("s.mp4")
        assert "is a pipe, a device or a socket" in refusal("s.mp4")
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames" / "1.png")
    assert "holds no frames" in refusal(tmp_path / "frames")


@pytest.mark.parametrize("address", ["https://example.com/a.mp4", "rtsp://10.0.0.1:554/x", "s3://bucket/v.mp4"])
def test_an_address(address: str) -> None:
    """`Path` merges two slashes into one; the message has the whole address."""
    for path in (address, Path(address)):
        assert refusal(path).startswith(f"{address}: is an address")


def test_names_that_look_like_addresses(plain: Path, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        for name in (
            "x:y.mp4",
            "http:a.mp4",
            "pipe:",
            "concat:a|b.mp4",
            "a b#?%03d.mp4",
            os.fsdecode(b"bad\xff.mp4"),
            "-x",
        ):
            shutil.copy(plain, name)
            clip = open_video(name, ALL)
            assert sum(map(len, clip.batches(16, 32))) == 48
            if name.isprintable():  # decord refuses names that are not UTF-8
                assert open_video(name, ALL, backend="decord").reader.total == 50


def test_impossible_file_names(tmp_path: Path) -> None:
    assert "no such video" in refusal(tmp_path / "missing.mp4")
    assert "no such video" in refusal(tmp_path / "a\0b.mp4")
    assert "File name too long" in refusal(tmp_path / ("a" * 5000))
    assert "no video is given" in refusal("")
    (tmp_path / "file").touch()
    assert "no such video" in refusal(tmp_path / "file" / "a.mp4")


def test_a_playlist_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Playlists open no other files, and no format may use the network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        segment = write_video(tmp_path / "a.ts", constant(50), BY_SUFFIX["ts"])
        for target in (str(segment), "a.ts", address):
            text = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n"
            (tmp_path / "a.m3u8").write_text(text)
            assert "a playlist: give a video file itself" in refusal(tmp_path / "a.m3u8")
            (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile '{target}'\n")
            assert "a playlist: give a video file itself" in refusal(tmp_path / "a.mp4")
        monkeypatch.setattr(containers, "_formats", lambda: "concat,hls,mpegts")
        refusal(tmp_path / "a.m3u8")
        with pytest.raises(TimeoutError):
            server.accept()


def test_an_unknown_codec(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "unknown.mp4").write_bytes(plain.read_bytes().replace(b"avc1", b"zzz1"))
    for backend in ("pyav", "decord"):
        assert "a codec that FFmpeg does not know" in refusal(tmp_path / "unknown.mp4", backend=backend)


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Skipped for root, which may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user may read."""
    folder = Path(f"/tmp/xl2jax-test-{os.getpid()}")
    folder.mkdir()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_no_permission(plain: Path, open_folder: Path) -> None:
    shutil.copy(plain, open_folder / "a.mp4")
    (open_folder / "frames").mkdir()
    Image.new("RGB", (8, 8)).save(open_folder / "frames" / "0.png")
    (open_folder / "closed").mkdir()
    clip, images = open_video(open_folder / "a.mp4", ALL), open_video(open_folder / "frames")
    for path, mode in (("a.mp4", 0), ("frames/0.png", 0), ("closed", 0)):
        (open_folder / path).chmod(mode)
    with another_user():
        for refused in (lambda: next(clip.batches(4, 8)), images.check):  # between opening and reading
            with pytest.raises(UserError, match="no permission to read it"):
                refused()
        for path in ("a.mp4", "closed", "closed/a.mp4"):
            assert refusal(open_folder / path).endswith(f"{path}: no permission to read it")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes(workers: int, plain: Path, tmp_path: Path) -> None:
    """The file vanishes, or is replaced, between opening and reading."""
    shutil.copy(plain, tmp_path / "a.mp4")
    clip = open_video(tmp_path / "a.mp4", ALL)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(UserError, match=r"a.mp4: no such"):
        next(clip.batches(4, 8, workers=workers))
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"a.mp4: is a pipe"):
        next(clip.batches(4, 8, workers=workers))
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.mp4").write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match=r"a.mp4: not a video that can be read"):
        next(clip.batches(4, 8, workers=workers))


def test_a_folder_without_images(plain: Path, tmp_path: Path) -> None:
    assert "no file ends in .bmp, .jpeg" in refusal(tmp_path)
    shutil.copy(plain, tmp_path / "holiday.mp4")
    assert "holds no frames (it holds a video, holiday.mp4: name that file" in refusal(tmp_path)
    shutil.copy(plain, tmp_path / "b.MOV")
    assert "it holds 2 videos, such as b.MOV: name that file" in refusal(tmp_path)
    phone = tmp_path / "phone"
    phone.mkdir()
    for name in ("a.HEIC", "b.heic", "._c.png", "notes.txt"):
        (phone / name).touch()
    assert "it holds 2 .heic files: convert them to .jpg or .png first" in refusal(phone)


@pytest.mark.parametrize("suffix", ["ts", "m2ts", "mpg", "vob", "asf", "wmv", "gif", "webp"])
def test_formats_that_decord_reads_wrongly(suffix: str, tmp_path: Path) -> None:
    """The format counts, not the name."""
    path = write_video(tmp_path / f"a.{suffix}", constant(50), BY_SUFFIX[suffix])
    line = refusal(path.rename(tmp_path / "a.mp4"), backend="decord")
    assert re.search("decord gives wrong frames of .* files, or none; use the backend pyav", line)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "3gp", "mkv", "webm", "vp9.webm", "flv", "ogv", "avi", "mjpeg.avi"])
def test_formats_that_decord_reads(suffix: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"a.{suffix}", constant(50), BY_SUFFIX[suffix], encoder={"g": "12"})
    one, two = (open_video(path, ALL, backend=backend) for backend in ("decord", "pyav"))
    assert one.times == two.times
    assert np.array_equal(next(one.batches(48, 32)), next(two.batches(48, 32)))


def test_files_whose_frames_decord_miscounts(tmp_path: Path) -> None:
    b_frames = write_video(tmp_path / "a.avi", constant(50), BY_SUFFIX["avi"], encoder={"bf": "2"})
    assert "decord gives wrong frames of avi files with B-frames" in refusal(b_frames, backend="decord")
    muxer = {"avoid_negative_ts": "disabled"}
    edited = write_video(tmp_path / "edit.mp4", constant(50, -1.0), BY_SUFFIX["mp4"], muxer=muxer)
    assert re.search(r"decord counts \d+ frames where 25 are shown", refusal(edited, backend="decord"))


def test_sizes_are_bounded(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_PIXELS", 64 * 48 - 1)
    assert "claims frames of 64 x 48 pixels, more than can be read" in refusal(plain)
    # A small PNG whose header states 100,000 x 100,000 pixels.
    header = struct.pack(">II5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    raw = (tmp_path / "0.png").read_bytes()
    import zlib

    bomb = raw[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + raw[33:]
    (tmp_path / "0.png").write_bytes(bomb)
    assert "0.png: has more pixels than can be read" in refusal(tmp_path)


def test_damaged_frames_give_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If every tenth frame is damaged, one warning counts them, with every way of reading."""
    path = write_video(tmp_path / "a.mkv", constant(100), BY_SUFFIX["mkv"], encoder={"g": "1"})
    raw = path.read_bytes()
    for i, packet in enumerate(packets(path)):
        if i % 10 == 3:
            raw = raw.replace(packet, packet[:4] + bytes(len(packet) - 4))
    path.write_bytes(raw)
    for workers in (0, 3):
        caplog.clear()
        frames = np.concatenate(list(open_video(path, ALL).batches(16, 32, workers=workers)))
        assert len(frames) == 100
        (record,) = caplog.records
        assert (
            "10 of 100 frames are damaged (the first at 0.1 s); each is replaced by the next good one" in record.message
        )


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Damages bytes: flips bits, removes, zeroes or doubles blocks, cuts the end, or changes a header."""
    data = bytearray(raw)
    near = min(len(data), 1500) if rng.random() < 0.5 else len(data)  # half the time in the header

    def place() -> int:
        return rng.randrange(near)

    how = rng.randrange(7)
    if how == 0:
        for _ in range(rng.choice([1, 3, 10, 60])):
            data[place()] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[place() :]
    elif how == 2:
        start, length = place(), rng.choice([1, 4, 16, 200, 2000])
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif how == 3:
        start, length = place(), rng.choice([4, 8, 64])
        data[start : start + length] = b"\xff" * len(data[start : start + length])
    elif how == 4:
        start = place()
        del data[start : start + rng.choice([1, 4, 64, 500])]
    elif how == 5:
        start, length = place(), rng.choice([4, 64, 500])
        data[start:start] = data[start : start + length]
    else:
        codes = [m.start() for m in re.finditer(rb"[a-z][a-z0-9]{3}", raw)] or [0]
        start = max(rng.choice(codes) + rng.choice([-4, 0, 4, 8, 12]), 0)
        data[start : start + 4] = rng.choice([b"zzz1", bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\1", rng.randbytes(4)])
    return bytes(data)


def test_damaged_videos(tmp_path: Path) -> None:
    """Each damaged video is read, or refused with one line, within a time limit."""
    originals = {k.suffix: write_video(tmp_path / f"a.{k.suffix}", constant(30), k).read_bytes() for k in KINDS}
    originals["avif"] = originals["mp4"]
    originals["raw.h264"] = write_video(
        tmp_path / "a.h264", constant(30), Kind("", "libx264", "h264", ticks=25)
    ).read_bytes()
    originals["live.webm"] = write_recorder_webm(tmp_path / "live.webm", 30).read_bytes()
    outcomes, lines = {"read": 0}, []
    for seed in range(200):
        rng = random.Random(seed)
        suffix = rng.choice(sorted(originals))
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(damaged(originals[suffix], rng))
        try:
            for batch in open_video(path, ALL).batches(8, 16, workers=rng.choice([0, 2])):
                assert batch.shape[1:] == (16, 16, 3)
                assert len(batch) % 4 == 0
            outcomes["read"] += 1
        except UserError as e:
            lines.append(str(e))
    outcomes["refused"] = len(lines)
    assert not [line for line in lines if "\n" in line]
    assert min(outcomes.values()) > 20
    assert not [t for t in threading.enumerate() if t.name.startswith("read ") and not t.daemon]


def test_any_error_of_pyav_is_one_line(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On damaged files PyAV raises more types than its own errors."""
    for error in (AttributeError("x"), ValueError("a\nb"), OverflowError("x"), RuntimeError("x")):

        def failing(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(av, "open", failing)
            assert "plain.mp4: not a video that can be read" in refusal(plain)
        reader = PyAVReader(plain)
        with monkeypatch.context() as patch:
            patch.setattr("xl2jax.video.readers.upright", failing)
            with pytest.raises(UserError, match="plain.mp4: not a video that can be read"):
                next(reader.frames(np.array([3])))
