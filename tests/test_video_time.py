"""Frame counts, frame times and the choice of the video stream, for containers with right and wrong headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from odd_videos import (
    BY_SUFFIX,
    KINDS,
    Kind,
    constant,
    handlers,
    number_of,
    packets,
    picture,
    recorded,
    sequential,
    write_edited,
    write_recorder_webm,
    write_video,
)  # fmt: skip
from PIL import Image

from xl2jax.errors import UserError
from xl2jax.video.clip import open_reader, open_video
from xl2jax.video.frame_sampling import MAX_FRAMES, FrameSampling, frame_times, sample_indices
from xl2jax.video.index import _vp9_shown
from xl2jax.video.readers import PyAVReader

ALL = FrameSampling(fps=25, max_fps=None)


def numbers_read(path: Path, indices: list[int]) -> list[int]:
    return [number_of(frame) for frame in PyAVReader(path).frames(np.asarray(indices))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.suffix)
def test_every_container(kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frames, rate, length and times of a plain recording, read sequentially, with seeks and in threads."""
    path = write_video(tmp_path / f"plain.{kind.suffix}", constant(50), kind, encoder={"g": "12"})
    reader = PyAVReader(path)
    assert reader.total == 50
    assert reader.fps == pytest.approx(25, rel=0.05)  # in Ogg the first frame is 1 ms long
    assert reader.duration == pytest.approx(2.0, abs=0.08)
    assert numbers_read(path, [0, 7, 8, 8, 31, 49]) == [0, 7, 8, 8, 31, 49]
    clip = open_video(path, ALL)
    clip.check()
    assert clip.times == pytest.approx(frame_times(clip.indices, 25), abs=0.101)
    for workers in (0, 2):
        (batch,) = clip.batches(48, 32, workers=workers)
        assert [number_of(frame) for frame in batch] == list(range(48))
    assert ("is used instead" in caplog.text) == (kind.suffix == "ogv")
    assert "cut off" not in caplog.text


RECORDED = ["webm", "mkv", "flv", "asf", "ogv", "mov", "mp4", "ts", "wmv", "vp9.webm"]


@pytest.mark.parametrize("suffix", RECORDED)
def test_irregular_frame_times(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For any stated rate, frames are spread over the whole recording and get their presentation times."""
    times = recorded(200)
    path = write_video(tmp_path / f"recorded.{suffix}", times, BY_SUFFIX[suffix])
    clip = open_video(path)
    assert clip.duration == pytest.approx(times[-1], abs=0.3)
    assert clip.reader.total == 200
    assert clip.reader.fps == pytest.approx(200 / times[-1], rel=0.05)
    assert clip.times[-1] > 0.85 * times[-1]
    # The Ogg muxer writes all VP8 times but the first one frame too early.
    expected = [times[max(i - 1, 0)] if suffix == "ogv" else times[i] for i in clip.indices]
    assert clip.times == pytest.approx(expected, abs=0.1)
    assert all(type(t) is float and t == round(t, 1) for t in clip.times)
    assert len([r for r in caplog.records if "is used instead" in r.message]) == (suffix not in ("mov", "mp4"))
    assert len([r for r in caplog.records if "is given presentation times" in r.message]) == 1


def test_a_browsers_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_recorder_webm(tmp_path / "recorder.webm")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.guessed_rate == 1000  # a reader that trusted the container would use this rate
        assert container.duration is None
    clip = open_video(path)
    times = recorded(125)
    assert clip.duration == pytest.approx(times[-1], abs=0.1)
    assert clip.times[-1] == pytest.approx(times[clip.indices[-1]], abs=0.1)
    assert clip.indices[-1] > 115
    line = next(r.message for r in caplog.records if "is used instead" in r.message)
    assert re.search(r"recorder.webm: the container states 1000 frames .* 125 frames last 11.\d s", line)


def test_the_stated_rate_is_used_within_five_percent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Matroska states a rate of 25 for any frame times."""
    for step, is_used in ((1.04, True), (1.08, False)):
        caplog.clear()
        path = write_video(tmp_path / "a.mkv", [step * t for t in constant(100)], BY_SUFFIX["mkv"])
        rate = open_reader(path).fps
        assert rate == (25 if is_used else pytest.approx(25 / step, rel=0.01))
        assert ("is used instead" in caplog.text) != is_used


def vfr(path: Path) -> tuple[Path, list[float]]:
    times = [i / 30 for i in range(300)] + [10.0 + i for i in range(10)]
    return write_video(path, times, BY_SUFFIX["mp4"]), times


def test_variable_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frames are chosen as upstream does, with presentation times or, on request, upstream's times."""
    path, times = vfr(tmp_path / "vfr.mp4")
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
    config = FrameSampling(fps=15, max_fps=None)
    chosen, by_rate = sample_indices(310, rate, 15, None, 256)
    clip = open_video(path, config)
    assert clip.indices.tolist() == chosen.tolist()
    assert clip.times == pytest.approx([times[i] for i in chosen], abs=0.051)
    assert max(abs(a - b) for a, b in zip(clip.times, by_rate, strict=True)) > 2
    assert times[-1] < clip.duration <= times[-1] + 1
    assert len(caplog.records) == 1
    assert "the frame rate varies" in caplog.text
    caplog.clear()
    upstream = open_video(path, FrameSampling(fps=15, max_fps=None, times="upstream"))
    assert upstream.times == by_rate
    assert upstream.indices.tolist() == chosen.tolist()
    assert not caplog.records


def test_small_differences_keep_upstreams_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = [t + (0.8 if i >= 50 else 0) for i, t in enumerate(constant(100))]
    path = write_video(tmp_path / "a.mp4", times, BY_SUFFIX["mp4"])
    clip = open_video(path, FrameSampling(fps=5, max_fps=None))
    assert clip.times != pytest.approx([times[i] for i in clip.indices], abs=0.3)
    assert clip.times == frame_times(clip.indices, clip.reader.fps)
    assert not caplog.records


def test_avi_counts_dropped_frames(tmp_path: Path) -> None:
    """AVI stores no times, but it has an empty chunk for each dropped frame."""
    times = [*constant(25), *constant(25, 3.0)]
    # With B-frames the chunks are in decoding order, so the reordered frames lie on the other side of the gap.
    for name, kind, encoder, delayed in (
        ("plain", BY_SUFFIX["avi"], {}, []),
        ("mjpeg", BY_SUFFIX["mjpeg.avi"], {}, []),
        ("b-frames", BY_SUFFIX["avi"], {"bf": "2"}, [25]),
        ("h264", Kind("avi", "libx264", "avi", ticks=25), {}, [25, 26]),
    ):
        path = write_video(tmp_path / f"{name}.avi", times, kind, encoder=encoder)
        clip = open_video(path, ALL)
        assert clip.duration == pytest.approx(4.0)
        assert numbers_read(path, list(range(50))) == list(range(50))
        wrong = [i for i, t in zip(clip.indices, clip.times, strict=True) if abs(t - times[i]) > 0.051]
        assert wrong == delayed


def test_a_stream_without_times_keeps_its_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "raw.h264", constant(50), Kind("h264", "libx264", "h264", ticks=25))
    reader = open_reader(path)
    assert (reader.total, reader.fps, reader.seconds) == (50, 25.0, None)
    assert numbers_read(path, [0, 20, 49]) == [0, 20, 49]
    assert not caplog.records


def test_two_recordings_in_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MPEG-TS files can be concatenated: times then restart in the middle."""
    one = write_video(tmp_path / "one.ts", constant(50, 5.0), BY_SUFFIX["ts"]).read_bytes()
    two = write_video(tmp_path / "two.ts", constant(50), BY_SUFFIX["ts"]).read_bytes()
    (tmp_path / "both.ts").write_bytes(one + two)
    reader = open_reader(tmp_path / "both.ts")
    assert (reader.total, reader.fps) == (100, 25.0)
    assert reader.duration == pytest.approx(4, abs=0.1)
    assert reader.seconds is not None
    assert (np.diff(reader.seconds) > 0).all()
    wanted = [0, 30, 49, 50, 51, 80, 99]
    assert numbers_read(tmp_path / "both.ts", wanted) == [0, 30, 49, 0, 1, 30, 49]
    assert not caplog.records


LATE = ["mp4", "mov", "mkv", "webm", "flv", "asf", "ts", "mpg", "ogv"]


@pytest.mark.parametrize("suffix", LATE)
def test_a_late_start(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Times count from the first frame. Only cut files are reported as cut off, if their format states a length."""
    muxer = {"movflags": "faststart"} if suffix in ("mp4", "mov") else {}
    path = write_video(tmp_path / f"late.{suffix}", constant(150, 10.0), BY_SUFFIX[suffix], muxer=muxer)
    clip = open_video(path)
    assert (clip.times[0], clip.times[-1]) == (0.0, pytest.approx(5.6, abs=0.2))
    assert clip.duration == pytest.approx(6.0, abs=0.1)
    assert numbers_read(path, [0, 50, 149]) == [0, 50, 149]
    assert "cut off" not in caplog.text
    if suffix not in ("ts", "mpg", "ogv", "asf"):  # FFmpeg ignores the length of a cut ASF file
        raw = path.read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(raw[: len(raw) * 4 // 5])
        assert 25 < open_reader(cut).total < 125
        assert caplog.text.count("cut off") == 1


@pytest.mark.parametrize("suffix", ["ts", "mpg", "asf", "mov", "mp4"])
def test_negative_times(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """mp4 and mov hide frames before time zero with an edit list that begins between two key frames."""
    muxer = {"avoid_negative_ts": "disabled"}
    path = write_video(tmp_path / f"early.{suffix}", constant(100, -2.0), BY_SUFFIX[suffix], muxer=muxer)
    expected = [number_of(frame) for frame in sequential(path)]
    assert expected == (list(range(50, 100)) if suffix in ("mp4", "mov") else list(range(100)))
    reader = open_reader(path)
    assert reader.total == len(expected)
    assert reader.fps == 25
    assert numbers_read(path, [0, 1, 30, len(expected) - 1]) == [expected[i] for i in (0, 1, 30, -1)]
    assert "cut off" not in caplog.text


def test_hidden_packets_are_no_frames(tmp_path: Path) -> None:
    """VP8 and VP9 have frames that are never shown; in some files these have packets of their own."""
    vp8 = write_video(tmp_path / "a.webm", constant(40), BY_SUFFIX["webm"])
    vp9 = write_video(tmp_path / "b.webm", constant(40), BY_SUFFIX["vp9.webm"], encoder={"g": "1"})
    for path, show in ((vp8, 0x10), (vp9, 0x02)):  # the bit that shows a frame (in VP9's key frames)
        originals = packets(path)
        hidden = {i: bytes([originals[i][0] & ~show, *originals[i][1:]]) for i in (7, 20, 21, 33)}
        edited = write_edited(path, tmp_path / f"hidden.{path.name}", hidden)
        shown = [number_of(frame) for frame in sequential(edited)]
        assert shown == [i for i in range(40) if i not in hidden]
        reader = open_reader(edited)
        assert reader.total == 36
        assert numbers_read(edited, [0, 7, 8, 20, 35]) == [shown[i] for i in (0, 7, 8, 20, 35)]
        clip = open_video(edited, ALL)
        assert clip.times == pytest.approx([shown[i] / 25 for i in clip.indices], abs=0.1)


def test_packets_of_vp9() -> None:
    key, hidden_key, again = b"\x82rest", b"\x80rest", b"\x88"
    assert [_vp9_shown(memoryview(p)) for p in (key, hidden_key, again)] == [True, False, True]
    profile_3 = [b"\xb1rest", b"\xb2rest", b"\xb0rest", b"\xb4"]  # its header is one bit longer
    assert [_vp9_shown(memoryview(p)) for p in profile_3] == [True, False, False, True]

    def superframe(*frames: bytes) -> memoryview:
        marker = 0xC0 | len(frames) - 1  # each size has one byte
        return memoryview(b"".join(frames) + bytes([marker, *map(len, frames), marker]))

    assert _vp9_shown(superframe(hidden_key, key))
    assert _vp9_shown(superframe(hidden_key, hidden_key, again))
    assert not _vp9_shown(superframe(hidden_key, hidden_key))
    assert not _vp9_shown(memoryview(b"\x80\xc3"))  # ends like a superframe, but is too short for one


def test_a_frame_shown_again(tmp_path: Path) -> None:
    """VP9 has one-byte packets that show an earlier frame."""
    path = write_video(tmp_path / "a.webm", constant(20), BY_SUFFIX["vp9.webm"], encoder={"g": "1"})
    longer = write_edited(path, tmp_path / "longer.webm", {}, append=b"\x88")
    assert len(sequential(longer)) == open_reader(longer).total == 21
    assert numbers_read(longer, [20]) == [19]


def size_read(path: Path, backend: Any = "pyav") -> tuple[int, int]:
    frame = next(iter(open_reader(path, backend).frames(np.array([2]))))
    return frame.shape[1], frame.shape[0]


def test_the_best_stream(tmp_path: Path) -> None:
    """As decord does: in mp4 the stream with the higher bit rate, and among equals the first."""
    mp4 = write_video(tmp_path / "two.mp4", constant(50), BY_SUFFIX["mp4"], streams=2)
    assert size_read(mp4) == size_read(mp4, "decord") == (128, 96)
    mkv = write_video(tmp_path / "two.mkv", constant(50), BY_SUFFIX["mkv"], streams=2)
    assert size_read(mkv) == size_read(mkv, "decord")


def test_a_track_of_depth_is_not_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "two.mp4", constant(50), BY_SUFFIX["mp4"], streams=2)
    for track, size in enumerate([(128, 96), (64, 48)]):
        raw = bytearray(path.read_bytes())
        at = handlers(path)[track]
        raw[at : at + 4] = b"auxv"
        (tmp_path / "depth.mp4").write_bytes(raw)
        assert size_read(tmp_path / "depth.mp4") == size


def test_an_alpha_plane_is_not_the_video(tmp_path: Path) -> None:
    """An animated AVIF stores transparency as a second track, here with a higher bit rate than the colours."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 1), np.uint8)
    images = [Image.fromarray(np.concatenate([picture(i, (64, 48)), noise[i]], axis=2), "RGBA") for i in range(20)]
    path = tmp_path / "alpha.avif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        assert best is not None
        assert best.codec_context.pix_fmt == "gray"  # FFmpeg would choose this stream
    assert numbers_read(path, list(range(20))) == list(range(20))


def write_with_cover(path: Path, frames: int) -> Path:
    from av.stream import Disposition

    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 400, 400, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = container.add_stream("aac", rate=44100)
        video = container.add_stream("libx264", rate=25) if frames else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        image = av.VideoFrame.from_ndarray(np.full((400, 400, 3), 90, np.uint8), format="rgb24")
        container.mux([*cover.encode(image), *cover.encode()])
        if video is not None:
            for i in range(frames):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture(i, (64, 48)), format="rgb24")))
            container.mux(video.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 44100, 0
        container.mux([*sound.encode(silence), *sound.encode()])
    return path


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    assert size_read(write_with_cover(tmp_path / "song.mp4", 10)) == (64, 48)
    with pytest.raises(UserError, match=r"holds no video \(only a cover picture, audio\)"):
        open_video(write_with_cover(tmp_path / "sound.mp4", 0))


@pytest.mark.parametrize(("frames", "wanted"), [(50, 24), (50, 50), (50, 26), (3, 16), (1, 8), (50, 200)])
def test_uniform(frames: int, wanted: int, tmp_path: Path) -> None:
    """Exactly the wanted number of frames (in whole groups), evenly spread; a short video repeats frames."""
    path = write_video(tmp_path / "a.mp4", constant(frames), BY_SUFFIX["mp4"])
    clip = open_video(path, FrameSampling(fps=None, max_fps=1, max_frames=wanted))
    expected = np.linspace(0, frames - 1, wanted).astype(int)[: wanted // 4 * 4]
    assert clip.indices.tolist() == expected.tolist()
    assert clip.times == frame_times(expected, clip.reader.fps)
    for workers in (0, 2):
        batches = np.concatenate(list(clip.batches(16, 32, workers=workers)))
        assert [number_of(frame) for frame in batches] == expected.tolist()
    assert sample_indices(frames, 25.0, None, 4, wanted)[0].tolist() == expected.tolist()


def test_settings_out_of_range() -> None:
    for options in ({"max_frames": MAX_FRAMES + 1}, {"fps": float("nan")}, {"times": "mine"}):
        with pytest.raises(UserError, match="must be"):
            FrameSampling(**options)
