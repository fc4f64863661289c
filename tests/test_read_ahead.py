"""Every way of reading gives the same frames as a sequential read, in bounded memory and without hanging."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from xl2jax.errors import UserError
from xl2jax.testing import shape_frame, write_clip
from xl2jax.video import read_ahead, readers
from xl2jax.video.clip import open_reader, open_video
from xl2jax.video.frame_sampling import FrameSampling
from xl2jax.video.image_files import images_in
from xl2jax.video.read_ahead import read_resized
from xl2jax.video.readers import DecordReader, PyAVReader, Reader

SIZE = 48


def write(
    path: Path,
    *,
    frames: int = 150,
    size: tuple[int, int] = (96, 64),
    rate: int = 24,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    variable: bool = False,
    **options: str,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.options = {"qp": "22"} | options
        if variable:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(shape_frame(i / 8, *size), format="rgb24")
            if variable:
                frame.pts, frame.time_base = 40 * i + 300 * (i // 30) + 7 * (i % 3), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


KINDS: dict[str, dict[str, Any]] = {
    "constant": {"g": "24"},
    "variable": {"variable": True, "g": "20"},
    "b-frames": {"g": "30", "bf": "4", "b-pyramid": "normal"},
    "open-gop": {"g": "25", "bf": "3", "x264-params": "open-gop=1:keyint=25:min-keyint=25"},
    "long-gop": {"g": "1000", "x264-params": "keyint=1000:scenecut=0"},
    "odd-size": {"size": (97, 65), "pixel_format": "yuv444p", "g": "24"},
    "10-bit": {"pixel_format": "yuv420p10le", "g": "24"},
    "all-key": {"g": "1"},
}


def sequential(path: Path) -> list[np.ndarray]:
    """All frames as FFmpeg decodes them, without code of this project."""
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@pytest.fixture(scope="module", params=list(KINDS))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    path = write(tmp_path_factory.mktemp("kinds") / f"{request.param}.mp4", **KINDS[request.param])
    return path, sequential(path)


SETS = {
    "all": np.arange(150), "sparse": np.array([3, 40, 41, 90, 149]), "every-9th": np.arange(0, 150, 9),
    "late": np.array([120, 121]), "repeated": np.array([7, 7, 100, 100]), "single": np.array([66]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SETS))
def test_same_frames(file: tuple[Path, list[np.ndarray]], name: str) -> None:
    path, expected = file
    indices = SETS[name]
    reader = PyAVReader(path)
    assert reader.total == len(expected) == 150
    got = list(reader.frames(indices))
    assert len(got) == len(indices)
    assert all(np.array_equal(a, expected[i]) for a, i in zip(got, indices, strict=True))
    parts = reader.spans(indices)
    assert np.concatenate(parts).tolist() == indices.tolist()
    resized = [read_ahead.resize(expected[i], SIZE) for i in indices]
    for workers in (0, 1, 3):
        ahead = list(read_resized(PyAVReader(path, threads=1), indices, SIZE, workers, "x"))
        assert all(np.array_equal(a, b) for a, b in zip(ahead, resized, strict=True))


def test_sparse_reading_decodes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", frames=600, g="30")
    decoded = 0
    plain = readers._decoded

    def counted(*args: Any) -> Iterator[Any]:
        nonlocal decoded
        for frame in plain(*args):
            decoded += 1
            yield frame

    monkeypatch.setattr(readers, "_decoded", counted)
    reader = PyAVReader(path, threads=1)
    list(reader.frames(np.array([10, 300, 599])))
    assert decoded < 100
    decoded = 0
    for span in reader.spans(np.arange(0, 600, 2)):
        list(reader.frames(span))
    assert decoded < 660  # every span begins at a key frame, so hardly any frame is decoded twice


def test_other_readers(clip: Path, tmp_path: Path) -> None:
    indices = np.arange(0, 300, 7)
    one = list(read_resized(DecordReader(clip), indices, SIZE, 2, "x"))
    two = list(read_resized(PyAVReader(clip), indices, SIZE, 2, "x"))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    for i in range(40):
        Image.fromarray(np.full((20, 30, 3), 6 * i, np.uint8)).save(tmp_path / f"{i}.png")
    reader = open_reader(tmp_path)
    assert len(images_in(tmp_path)) == 40
    got = list(read_resized(reader, np.arange(40), 8, 3, "x"))
    assert [int(f[0, 0, 0]) for f in got] == [6 * i for i in range(40)]


def test_truncated_file_gives_the_same_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write(tmp_path / "whole.mkv", frames=300, g="24")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    config = FrameSampling(fps=24, max_fps=None, max_frames=300)
    plain, ahead = (
        np.concatenate(list(open_video(cut, config).batches(16, SIZE, workers=w))) for w in (0, 3)
    )  # fmt: skip
    assert 40 < len(plain) < 300
    assert np.array_equal(plain, ahead)
    assert "cut off" in caplog.text


class Endless(Reader):
    """A video of any length that takes no time to decode, in spans of `span` frames."""

    fps = 1.0

    def __init__(self, total: int, span: int = 50):
        self.total, self._span = total, span

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return np.split(indices, range(self._span, len(indices), self._span))

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for i in indices:
            yield np.full((8, 8, 3), i % 251, np.uint8)


@contextlib.contextmanager
def counted_frames() -> Iterator[Callable[[], int]]:
    """Counts the resized frames that exist anywhere."""
    alive, lock, plain = [0], threading.Lock(), read_ahead.resize

    def died() -> None:
        with lock:
            alive[0] -= 1

    def resize(frame: np.ndarray, size: int) -> np.ndarray:
        small = plain(frame, size).copy()
        with lock:
            alive[0] += 1
        weakref.finalize(small, died)
        return small

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "resize", resize)
        yield lambda: alive[0]


def settled(value: Callable[[], int]) -> int:
    """The value of a counter after it has stopped changing for a while."""
    seen = -1
    while seen != (seen := value()):
        time.sleep(0.03)
    return seen


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 400), st.integers(1, 120), st.integers(2, 40), st.integers(1, 8),
    st.lists(st.integers(0, 400), max_size=2),
)  # fmt: skip
def test_waiting_frames_are_bounded_and_in_order(
    total: int, span: int, room: int, workers: int, pauses: list[int]
) -> None:
    """At most `room` frames per thread exist at a time, besides the caller's one.

    Spans are shorter or longer than the room, the number of threads varies, and the caller pauses now and then.
    """
    with counted_frames() as alive, pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "_WAITING_BYTES", room * 3 * 8 * 8)
        frames = read_resized(Endless(total, span), np.arange(total), 8, workers, "bounded")
        for i in range(total):
            assert next(frames)[0, 0, 0] == i % 251
            if i in pauses:
                assert settled(alive) <= room * workers + 1
            assert alive() <= room * workers + 1
        assert next(frames, None) is None
        assert settled(alive) == 0


def test_a_folder_of_images_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(120):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(read_ahead, "_WAITING_BYTES", 10 * 3 * 8 * 8)
    with counted_frames() as alive:
        frames = read_resized(open_reader(tmp_path), np.arange(120), 8, 3, "images")
        assert next(frames)[0, 0, 0] == 0
        assert 20 <= settled(alive) <= 3 * 10 + 1
        assert [int(f[0, 0, 0]) for f in frames] == list(range(1, 120))


def test_all_threads_read_at_once() -> None:
    """Threads wait for each other at their first frames, so a single reading thread would not continue."""
    barrier = threading.Barrier(4, timeout=10)

    class Together(Endless):
        def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
            barrier.wait()
            yield from super().frames(indices)

    assert len(list(read_resized(Together(80, span=20), np.arange(80), 8, 4, "x"))) == 80


def test_a_repeated_frame_is_resized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", frames=3)
    expected = [read_ahead.resize(frame, SIZE) for frame in sequential(path)]
    resized = 0

    def resize(frame: np.ndarray, size: int, plain: Any = read_ahead.resize) -> np.ndarray:
        nonlocal resized
        resized += 1
        return plain(frame, size)

    monkeypatch.setattr(read_ahead, "resize", resize)
    indices = np.repeat(np.arange(3), 40)
    got = list(read_resized(PyAVReader(path), indices, SIZE, 0, "x"))
    assert all(np.array_equal(a, expected[i]) for a, i in zip(got, indices, strict=True))
    assert resized == 3


def test_closing_ends_the_threads() -> None:
    frames = read_resized(Endless(10**6), np.arange(10**6), 8, 3, "closing")
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while any("closing" in t.name for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_errors_are_raised_in_order() -> None:
    class Broken(Endless):
        def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
            for frame in super().frames(indices):
                if indices[0] == 100:
                    raise UserError("frame 100 is broken")
                yield frame

    got: list[np.ndarray] = []
    with pytest.raises(UserError, match="frame 100 is broken"):
        got.extend(read_resized(Broken(500), np.arange(500), 8, 4, "x"))
    assert len(got) == 100


def test_a_decoder_that_hangs_is_an_error() -> None:
    class Hung(Endless):
        def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
            yield from itertools.islice(super().frames(indices), 30)
            threading.Event().wait(20)

    with pytest.raises(UserError, match=r"x.mp4: the decoder gave no frame for .* at 30.0 s"):
        list(read_resized(Hung(500, span=500), np.arange(500), 8, 2, "x.mp4", stall_seconds=0.5))


def test_the_caller_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that waits for the caller does not count as hung."""
    monkeypatch.setattr(read_ahead, "_WAITING_BYTES", 8 * 3 * 8 * 8)
    frames = read_resized(Endless(60, span=60), np.arange(60), 8, 1, "x", stall_seconds=0.3)
    count = 0
    for _ in frames:
        count += 1
        if count == 20:
            time.sleep(1.0)
    assert count == 60


def test_an_interrupt_ends_the_command(tmp_path: Path) -> None:
    """Ctrl-C while threads read gives one line and status 130, and no thread delays the exit."""
    path = tmp_path / "a.mp4"
    write_clip(path, 20, fps=24, width=320, height=240)
    code = (
        "import signal, time\n"
        "from pathlib import Path\n"
        "from xl2jax.system.terminal import run_command\n"
        "from xl2jax.video.clip import FrameSampling, open_video\n"
        "def main():\n"
        f"    clip = open_video(Path({str(path)!r}), FrameSampling(24.0, None, 480))\n"
        "    for batch in clip.batches(4, 384, workers=2):\n"
        "        print('reading', flush=True)\n"
        "        time.sleep(0.2)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # SIGINT is ignored if the tests run in the background
        "run_command(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
