"""Streams and clocks with faults: each becomes a gap in time or one clear line."""

from __future__ import annotations

import contextlib
import http.server
import io
import itertools
import math
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xl2jax
from xl2jax.errors import UserError
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.testing import shape_frame
from xl2jax.video.live_clock import LiveClock
from xl2jax.video.live_source import Buffer, Stream, address_of


class Watch:
    """A clock of this machine that a test sets."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def kept(clock: LiveClock, times: Any) -> list[float]:
    return [round(at, 6) for t in times if (at := clock.accept(t)) is not None]


# --- clocks --------------------------------------------------------------------------------------


def test_a_fast_source_is_sampled() -> None:
    """240 frames a second, as they are and with jitter; and a rate at which `FrameSampling` takes every second frame."""
    assert kept(LiveClock(1.0), (i / 240 for i in range(240 * 4))) == [0, 1, 2, 3]
    rng = np.random.default_rng(0)
    jittered = np.sort(np.arange(240 * 10) / 240 + rng.uniform(0, 0.02, 2400)).tolist()
    assert len(kept(LiveClock(2.0), jittered)) == pytest.approx(20, abs=1)
    assert kept(LiveClock(5.0), (i / 10 for i in range(10))) == [0, 0.2, 0.4, 0.6, 0.8]
    assert kept(LiveClock(None), [7.0, 7.01, 7.02]) == [0, 0.01, 0.02]


def test_frames_out_of_order_and_twice_are_left_out() -> None:
    clock = LiveClock(None)
    assert kept(clock, [0.0, 0.2, 0.1, 0.2, 0.3]) == [0, 0.2, 0.3]
    assert clock.late == 2


def test_a_clock_that_goes_back_by_an_hour_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    clock = LiveClock(1.0)
    assert kept(clock, [5000.0, 5001, 5002, 1402, 1403, 1404]) == [0, 1, 2, 3, 4]
    assert (clock.jumps, clock.late) == (1, 1)
    assert [r.message for r in caplog.records] == ["the video's clock went back by 3599.0 s: the video's time goes on"]


def test_a_frame_without_a_time_follows_the_last_one() -> None:
    now = Watch()
    now.seconds = 100_000.0
    clock, out = LiveClock(1.0, now=now), []
    for given_time in (0.0, 1.0, 2.0, None, None, 5.0, 6.0):
        out.append(clock.accept(given_time))
        now.seconds += 1
    assert out == [0, 1, 2, 3, 4, 5, 6]


def test_one_stray_time_changes_nothing() -> None:
    assert kept(LiveClock(1.0), [0.0, 1, 2, 900_000, 3, -4e5, 4, 5]) == [0, 1, 2, 3, 4, 5]


def test_a_pause_is_a_gap() -> None:
    assert kept(LiveClock(1.0), [0.0, 1, 300, 301]) == [0, 1, 300, 301]


def test_time_goes_on_while_a_stream_is_opened_anew() -> None:
    now = Watch()
    clock = LiveClock(1.0, now=now)
    assert kept(clock, [50.0, 51]) == [0, 1]
    now.seconds += 30
    clock.interrupted()
    assert kept(clock, [0.0, 1, 2]) == [31, 32, 33]


def test_a_damaged_frame_does_not_cost_its_interval() -> None:
    clock = LiveClock(1.0)
    assert kept(clock, [0.0, 1.0]) == [0, 1]
    clock.lost()
    assert kept(clock, [1.2, 1.4, 2.0]) == [1.2, 2]


def test_wall_time_and_frames_without_a_time() -> None:
    now = Watch()
    for clock, dated in ((LiveClock(1.0, "wall", now=now), 3.0), (LiveClock(1.0, now=now), None)):
        out = []
        for _ in range(3):
            out.append(clock.accept(dated))
            now.seconds += 7
        assert out == [0, 7, 14]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(), st.floats(-1e4, 1e4)), max_size=60),
    st.sampled_from([None, 0.1, 1.0, 30.0]),
)
def test_whatever_comes_seconds_rise(times: list[float | None], fps: float | None) -> None:
    ticks = itertools.count()
    clock = LiveClock(fps, now=lambda: float(next(ticks)))
    out = [at for t in times if (at := clock.accept(t)) is not None]
    assert all(a < b for a, b in itertools.pairwise(out))
    assert all(math.isfinite(at) and at >= 0 for at in out)


def test_a_full_buffer_drops_its_oldest() -> None:
    buffer = Buffer[int](3)
    for i in range(5):
        buffer.put(i)
    assert (buffer.take(0), buffer.dropped) == ([2, 3, 4], 2)
    assert buffer.take(0) == []
    buffer.end()
    assert buffer.take(0) is None


# --- streams -------------------------------------------------------------------------------------


def mpeg_ts(seconds: int, size: tuple[int, int] = (96, 64)) -> bytes:
    """An MPEG-TS stream of `shape_frame`, 10 frames a second and a key frame each second."""
    return recorded(seconds, size)


def recorded(
    seconds: int,
    size: tuple[int, int] = (96, 64),
    *,
    container: str = "mpegts",
    options: dict[str, str] | None = None,
) -> bytes:
    """A recording of `shape_frame` in another container."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as out:
        stream: Any = out.add_stream("mpeg2video" if container == "mpegts" else "mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.max_b_frames = *size, "yuv420p", 10, 0
        for i in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(shape_frame(i / 10, *size), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


@contextlib.contextmanager
def server(replies: list[list[bytes]], gate: threading.Event | None = None, *, length: bool = False) -> Iterator[str]:
    """Gives each connection the next of `replies` in parts, and status 404 afterwards. `length`: says how long it is.

    Where there is a `gate`, the last part of a reply waits for it.
    """
    waiting = iter(replies)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = next(waiting, None)
            if parts is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            if length:
                self.send_header("Content-Length", str(sum(map(len, parts))))
            self.end_headers()
            with contextlib.suppress(OSError):
                for part in parts[:-1]:
                    self.wfile.write(part)
                self.wfile.flush()
                if gate is not None:
                    gate.wait(240)
                self.wfile.write(parts[-1])

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{served.server_port}/camera.ts"
        finally:
            served.shutdown()


FFMPEG_SERVER = """
import sys, av, numpy as np
for size in (64, 96):  # one connection after the other, with frames of another size
    with av.open(sys.argv[1], "w", format="mpegts", options={"listen": "1"}) as out:
        stream = out.add_stream("mpeg2video", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = size, size, "yuv420p", 10
        for i in range(40):
            frame = np.full((size, size, 3), 6 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
"""
"""Serves two streams with FFmpeg's own HTTP server."""


@contextlib.contextmanager
def ffmpeg_server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/camera.ts"
    with subprocess.Popen([sys.executable, "-c", FFMPEG_SERVER, url]) as served:
        try:
            yield url
        finally:
            served.kill()


def stream(address: str) -> Stream:
    return Stream(address, retries=2, first_wait=0.01, timeout=240)


def test_garbage_and_a_cut_are_gaps(caplog: pytest.LogCaptureFixture) -> None:
    """The second connection has frames of another size."""
    first, second = mpeg_ts(3), mpeg_ts(2, (128, 96))
    noise = np.random.default_rng(0).bytes(5000)
    cut = len(first) * 2 // 3 // 188 * 188
    with server([[first[:cut], noise, first[cut:-300]], [second]]) as url:
        source = stream(url)
        frames = [(t, f()) for t, f in source]
    assert source.opened == 2
    sizes = [f.shape[:2] for _, f in frames if f is not None]
    assert sizes.count((64, 96)) >= 20
    assert sizes.count((96, 128)) >= 19
    assert "tried 2 more times" in caplog.records[-1].message


def test_a_stream_of_ffmpeg_is_watched_and_opened_anew() -> None:
    """The server is not there at first, and it is gone between its two connections."""
    with ffmpeg_server() as url:
        source = Stream(url, retries=9, first_wait=0.02, timeout=60)
        sizes, times = [], []
        for seconds, frame in source:
            assert seconds is not None
            picture = frame()
            assert picture is not None
            sizes.append(len(picture))
            times.append(seconds)
            if sizes.count(96) == 30:
                source.close()
    assert source.opened == 2
    assert sizes.count(64) >= 38  # the last frames may be lost where the connection ends
    assert sizes == sorted(sizes)
    assert np.diff(times[:38]) == pytest.approx(0.1)
    assert source.damaged == 0


def grow(path: Path, data: bytes, parts: int, seen: threading.Semaphore) -> None:
    """Appends the data to a file in parts. The second half waits until a frame of the first one was seen."""
    size = math.ceil(len(data) / parts)
    for number, at in enumerate(range(0, len(data), size)):
        if number == parts // 2:
            assert seen.acquire(timeout=60)
        with open(path, "ab") as out:
            out.write(data[at : at + size])


@pytest.mark.parametrize(
    ("container", "options"), [("mpegts", {}), ("matroska", {}), ("mp4", {"movflags": "frag_keyframe+empty_moov"})]
)
def test_a_file_that_grows_is_followed(tmp_path: Path, container: str, options: dict[str, str]) -> None:
    """It is empty at first, and has ended when nothing is added any more."""
    path, seen = tmp_path / "recording", threading.Semaphore(0)
    path.touch()
    writer = threading.Thread(target=grow, args=(path, recorded(14, container=container, options=options), 8, seen))
    writer.start()
    count = 0
    for _, frame in Stream(path, follow=True, timeout=1):
        count += 1
        seen.release()
        picture = frame()
        assert picture is not None
        assert picture.shape == (64, 96, 3)
    writer.join()
    assert count == 140


def test_what_cannot_be_followed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only files that are being written are followed"):
        Stream("http://127.0.0.1/a.ts", follow=True)
    path = tmp_path / "a.mp4"  # its index is written at the end, so that a part of it is no video
    data = recorded(2, container="mp4")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a video that can be read"):
        list(Stream(path, follow=True, timeout=0.5))


def test_a_recording_behind_an_address_is_watched_once() -> None:
    with server([[mpeg_ts(2)], [mpeg_ts(2)]], length=True) as url:
        source = stream(url)
        frames = [f() for _, f in source]
    assert (len(frames), source.opened, source.damaged) == (20, 1, 0)


def test_what_can_be_no_stream_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.ts").touch()
    for address, said in (
        ("foo://camera", "foo:// is not read"),
        ("file:///a.mp4", "give a path"),
        (tmp_path, "a folder"),
        (tmp_path / "empty.ts", "empty"),
    ):
        with pytest.raises(UserError, match=said):
            Stream(address)


def test_an_address_without_a_video_is_one_line() -> None:
    with server([]) as url, pytest.raises(UserError, match=r"gives no video \(.*404.*; tried 3 times\)"):
        list(stream(url))
    with server([[b"no video" * 1000]] * 3) as url, pytest.raises(UserError, match="gives no video"):
        list(stream(url))
    with pytest.raises(UserError, match="no such video"):
        Stream("missing.ts")


def test_local_files_and_pipes_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    path.write_bytes(mpeg_ts(1))
    assert len(list(Stream(path))) == 10
    path.write_bytes(b"garbage" * 999)
    with pytest.raises(UserError, match="not a video that can be read"):
        list(Stream(path))


def test_what_a_playlist_names_is_opened_by_the_caller_alone(tmp_path: Path) -> None:
    """FFmpeg opens no file and no connection where `connect` is given."""

    class Opened(io.BytesIO):
        url, length, is_playlist = "http://camera/a.m3u8", None, True

    asked: list[str] = []
    (tmp_path / "a.ts").write_bytes(mpeg_ts(1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        at = f"127.0.0.1:{listening.getsockname()[1]}"
        for item in (
            "b.ts",
            (tmp_path / "a.ts").as_uri(),
            str(tmp_path / "a.ts"),
            f"tcp://{at}/a.ts",
            f"rtp://{at}/a.ts",
        ):

            def connect(url: str, closed: threading.Event, item: str = item) -> Any:
                asked.append(url)
                if url.endswith("b.ts"):
                    return Opened(mpeg_ts(1))
                if not url.endswith(".m3u8"):
                    raise UserError("refused")
                head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
                return Opened(f"{head}{item}\n#EXT-X-ENDLIST\n".encode())

            source = Stream("http://camera/a.m3u8", retries=0, connect=connect)
            if item == "b.ts":
                assert len(list(source)) == 10
                assert asked == ["http://camera/a.m3u8", "http://camera/b.ts"]
            else:
                with pytest.raises(UserError, match="refused|gives no video"):
                    list(source)
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize("data", [b"", b"garbage" * 1000, b"#EXTM3U\nno playlist"])
def test_what_is_no_video_is_closed(data: bytes) -> None:
    class Opened(io.BytesIO):
        url, length, is_playlist = "http://camera/stream", None, data.startswith(b"#EXTM3U")

    opened = list[Opened]()

    def connect(url: str, closed: object) -> Opened:
        opened.append(Opened(data))
        return opened[-1]

    with pytest.raises(UserError, match="gives no video"):
        list(Stream("http://camera/stream", retries=1, first_wait=0.01, connect=connect))
    assert [each.closed for each in opened] == [True, True]


def test_pathlib_does_not_change_an_address() -> None:
    assert address_of(Path("rtsp://host:554/a/b")) == "rtsp://host:554/a/b"
    assert address_of("http://host/a") == "http://host/a"
    assert address_of(Path("/a/b.mp4")) == "/a/b.mp4"


@pytest.mark.slow
def test_questions_while_a_stream_is_watched(model: xl2jax.Model) -> None:
    """Answers come while the stream is open, about what was seen so far."""
    data, gate = mpeg_ts(12), threading.Event()
    half = len(data) // 2
    with server([[data[:half], data[half:]]], gate) as url:
        live = model.watch_live(stream(url), fps=5, memory=LiveMemory(dense_minutes=0.1, minutes=0.2))
        live.start()
        assert live.wait(4, timeout=240)
        early = model.ask(live, "What is shown?", max_new_tokens=2)
        assert not live.finished
        assert 4 <= early.chunks[-1].end < 8
        gate.set()
        assert live.wait(timeout=240)
        late = model.ask(live, "What is shown?", max_new_tokens=2)
        assert late.chunks[-1].end > 10
        assert live.dropped == 0
        live.close()
    with pytest.raises(UserError, match="closed"):
        model.ask(live, "What is shown?")
