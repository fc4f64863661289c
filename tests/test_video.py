from __future__ import annotations

import json
import struct
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from xl2jax.errors import UserError
from xl2jax.testing import write_clip
from xl2jax.video.clip import open_reader, open_video
from xl2jax.video.frame_sampling import FrameSampling, chosen_frames, sample_indices
from xl2jax.video.read_ahead import resize
from xl2jax.video.readers import PyAVReader


def test_sampling_equals_upstreams(goldens: Path) -> None:
    cases = json.loads((goldens / "frame_sampling.json").read_text())
    assert len(cases) > 100
    for case in cases:
        indices, times = sample_indices(
            case["total_frames"], case["video_fps"], case["sample_fps"], case["max_sample_fps"], case["max_frames"]
        )
        ends = (indices[:6].tolist(), indices[-6:].tolist(), times[:6], times[-6:])
        assert (len(indices), int(indices.sum())) == (case["n"], case["sum"]), case
        assert ends == (case["first"], case["last"], case["first_timestamps"], case["last_timestamps"]), case


@given(
    st.integers(1, 200_000), st.floats(1, 120), st.sampled_from([None, 5e-324, 0.1, 0.5, 1, 2]), st.sampled_from([None, 1, 4]),
    st.integers(4, 1000),
)  # fmt: skip
def test_sampling_properties(
    total: int, video_fps: float, fps: float | None, max_fps: int | None, max_frames: int
) -> None:
    indices, times = sample_indices(total, video_fps, fps, max_fps, max_frames)
    chosen = chosen_frames(total, video_fps, FrameSampling(fps, max_fps, max_frames))
    assert len(chosen) >= 4
    assert chosen[: len(indices)].tolist() == indices.tolist()
    if fps is None:
        assert len(indices) == max_frames // 4 * 4
    assert len(indices) == len(times)
    assert len(indices) % 4 == 0
    assert len(indices) <= max_frames
    if len(indices):
        assert indices[0] == 0
        assert indices[-1] < total
        assert (np.diff(indices) >= 0).all()


def test_preprocessing_equals_upstreams(goldens: Path) -> None:
    for name, expected in load_file(goldens / "preprocess.safetensors").items():
        height, width = map(int, name.split("x"))
        y, x, c = np.ogrid[:height, :width, :3]
        frame = np.floor(127.5 * (1 + np.sin(0.11 * x * (1 + 0.3 * c)) * np.cos(0.07 * y))).astype(np.uint8)
        small = resize(frame, 384)[::3, ::3].transpose(2, 0, 1)[None]
        assert np.abs(small.astype(int) - expected).max() <= 1, name


def test_repeated_indices_and_batches(clip: Path) -> None:
    frames = list(open_reader(clip, "pyav").frames(np.array([3, 3, 5])))
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[1], frames[2])
    batches = list(open_video(clip, FrameSampling(max_frames=20)).batches(8, 32))
    assert [b.shape for b in batches] == [(8, 32, 32, 3), (8, 32, 32, 3), (4, 32, 32, 3)]


def turned(path: Path, quarter_turns: int, tmp_path: Path) -> Path:
    """A copy of the clip with a display matrix in its track header."""
    one, minus = 0x10000, 0xFFFF0000
    matrix = {1: (0, one, 0, minus, 0, 0, 0, 0, 0x40000000), 2: (minus, 0, 0, 0, minus, 0, 0, 0, 0x40000000)}
    raw = path.read_bytes()
    at = raw.index(b"tkhd") + 4 + 40
    out = tmp_path / f"turned{quarter_turns}.mp4"
    out.write_bytes(raw[:at] + struct.pack(">9I", *matrix[quarter_turns]) + raw[at + 36 :])
    return out


@pytest.mark.parametrize("quarter_turns", [1, 2])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_rotation(quarter_turns: int, backend: Any, clip: Path, tmp_path: Path) -> None:
    upright = next(iter(PyAVReader(clip).frames(np.array([4]))))
    frame = next(iter(open_reader(turned(clip, quarter_turns, tmp_path), backend).frames(np.array([4]))))
    assert np.array_equal(frame, np.rot90(upright, -quarter_turns))


def test_decord_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    write_clip(tmp_path / "small.mp4", 2, fps=10, width=64, height=48)
    with pytest.raises(UserError, match="decord cannot read frames of this size or rotation; use the pyav"):
        list(open_video(turned(tmp_path / "small.mp4", 1, tmp_path), backend="decord").batches(4, 32))


def test_short_clip_repeats_its_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write_clip(path, 0.2, fps=10, width=64, height=48)
    clip = open_video(path)
    assert clip.indices.tolist() == [0, 0, 0, 0] or clip.indices.tolist() == [0, 1, 1, 1]
    (batch,) = clip.batches(16, 32)
    assert batch.shape[0] == 4
    assert np.array_equal(batch[2], batch[3])


def test_a_cut_off_file_gives_its_first_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is shorter than its index gives whole groups, and a warning with the last good time."""
    path = tmp_path / "whole.mp4"
    write_clip(path, 20, fps=10, width=96, height=64)
    with (
        av.open(str(path)) as a,
        av.open(str(tmp_path / "index_first.mp4"), "w", options={"movflags": "faststart"}) as b,
    ):
        out = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is not None:
                packet.stream = out
                b.mux(packet)
    raw = (tmp_path / "index_first.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(raw[: len(raw) * 2 // 3])
    clip = open_video(cut, FrameSampling(max_fps=None))
    whole = open_video(tmp_path / "index_first.mp4", FrameSampling(max_fps=None))
    frames = np.concatenate(list(clip.batches(8, 32)))
    assert 4 <= len(frames) < 20
    assert len(frames) % 4 == 0
    assert np.array_equal(frames[:4], next(iter(whole.batches(8, 32)))[:4])
    assert "cut off" in caplog.text


def test_damage_in_the_middle_loses_a_few_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "whole.mp4"
    write_clip(path, 20, fps=10, width=192, height=128)
    raw = bytearray(path.read_bytes())
    (tmp_path / "good.mp4").write_bytes(raw)
    with av.open(str(path)) as container:
        at = [p.pos for p in container.demux(video=0) if p.pos is not None]
    raw[at[90] : at[93]] = bytes(at[93] - at[90])
    path.write_bytes(raw)
    config = FrameSampling(fps=10, max_fps=None)
    frames = np.concatenate(list(open_video(path, config).batches(8, 32)))
    assert len(frames) == 200
    good = np.concatenate(list(open_video(tmp_path / "good.mp4", config).batches(8, 32)))
    assert np.array_equal(frames[:80], good[:80])
    assert np.abs(frames[199].astype(int) - good[199]).mean() < 20  # the frames are still aligned


def test_folder_of_frames(tmp_path: Path) -> None:
    for i in (10, 2, 1, 0, 3):
        Image.fromarray(np.full((20, 30, 3), 10 * i, np.uint8)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    clip = open_video(tmp_path, FrameSampling(max_fps=None), folder_fps=0.5)
    (batch,) = clip.batches(8, 8)
    assert batch[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert clip.times == [0.0, 2.0, 4.0, 6.0]


def write_audio(path: Path) -> None:
    with wave.open(str(path), "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(8000)
        w.writeframes(b"\0\0" * 8000)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_files_without_a_video(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    with pytest.raises(UserError, match="not a video that"):
        open_video(tmp_path / "text.mp4", backend=backend)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="not a video that"):
        open_video(tmp_path / "empty.mp4", backend=backend)
    with pytest.raises(UserError, match="no such video"):
        open_video(tmp_path / "missing.mp4", backend=backend)
    write_audio(tmp_path / "audio.wav")
    with pytest.raises(UserError, match="holds no video|not a video that"):
        open_video(tmp_path / "audio.wav", backend=backend)


def test_no_frames(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no frames"):
        open_video(tmp_path)
    path = tmp_path / "header.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48  # type: ignore[union-attr]
        container.start_encoding()
    with pytest.raises(UserError, match="holds no frames|not a video"):
        open_video(path)


def test_broken_image(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="0.jpg: not an image"):
        list(open_video(tmp_path).batches(4, 8))


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": -1}, {"max_fps": 0}, {"max_frames": 3}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        FrameSampling(**options)
