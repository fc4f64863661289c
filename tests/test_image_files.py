"""Folders of images: the order of files, and the colours of every kind of image."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from xl2jax.errors import UserError
from xl2jax.video.clip import open_video
from xl2jax.video.frame_sampling import FrameSampling
from xl2jax.video.image_files import images_in, read_image


def save(path: Path, value: int = 0) -> None:
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


def test_natural_order(tmp_path: Path) -> None:
    """Names sort by their numbers in ASCII digits; "²" and Arabic digits are letters. Hidden files are left out."""
    names = ["1.png", "2.png", "10.png", "a1b2.png", "a1b10.png", "a2b1.png", "b.JPG", "²3.png", "٣.png"]
    for name in random.Random(0).sample(names, len(names)):
        save(tmp_path / name)
    for name in ("._1.png", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in images_in(tmp_path)] == names
    assert open_video(tmp_path).reader.total == len(names)


@given(st.lists(st.text("0123456789aé²٣._-", min_size=1, max_size=12), max_size=8))
def test_any_names_can_be_ordered(tmp_path_factory: pytest.TempPathFactory, stems: list[str]) -> None:
    folder = tmp_path_factory.mktemp("names")
    for stem in stems:
        (folder / f"{stem}.png").touch()
    visible = {f"{stem}.png" for stem in stems if not stem.startswith(".")}
    if not visible:
        with pytest.raises(UserError, match="holds no frames"):
            images_in(folder)
        return
    assert {p.name for p in images_in(folder)} == visible
    numbered = [p.stem for p in images_in(folder) if p.stem.isascii() and p.stem.isdigit()]
    assert [int(stem) for stem in numbered] == sorted(int(stem) for stem in numbered)


GREY = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
COLOURS = np.stack([GREY, GREY[::-1], np.roll(GREY, 3, 1)], axis=2)
KINDS: dict[str, tuple[str, Any, np.ndarray]] = {
    "rgb": ("png", Image.fromarray(COLOURS), COLOURS),
    "rgba": ("png", Image.fromarray(np.concatenate([COLOURS, GREY[..., None]], axis=2)), COLOURS),
    "grey": ("png", Image.fromarray(GREY), np.repeat(GREY[..., None], 3, 2)),
    "grey-alpha": ("png", Image.fromarray(np.stack([GREY, GREY], 2), "LA"), np.repeat(GREY[..., None], 3, 2)),
    "grey-16": ("png", Image.fromarray(GREY.astype(np.uint16) * 257), np.repeat(GREY[..., None], 3, 2)),
    "one-bit": ("png", Image.fromarray(GREY > 100), np.repeat(255 * (GREY[..., None] > 100).astype(np.uint8), 3, 2)),
    "palette": ("png", Image.fromarray(COLOURS).quantize(256), COLOURS),
    "cmyk": ("jpg", Image.fromarray(255 - np.concatenate([COLOURS, 0 * GREY[..., None] + 255], 2), "CMYK"), COLOURS),
    "lossless-webp": ("webp", Image.fromarray(COLOURS), COLOURS),
    "bmp": ("bmp", Image.fromarray(COLOURS), COLOURS),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_colours(kind: str, tmp_path: Path) -> None:
    suffix, image, expected = KINDS[kind]
    image.save(tmp_path / f"a.{suffix}", quality=100, lossless=True)
    got = read_image(tmp_path / f"a.{suffix}")
    assert (got.shape, got.dtype) == ((6, 8, 3), np.uint8)
    # A palette is rounded, and JPEG is lossy.
    assert np.abs(got.astype(int) - expected).max() <= {"palette": 0, "cmyk": 40}.get(kind, 0)
    assert np.abs(got.astype(int) - expected).mean() <= {"cmyk": 12}.get(kind, 0)


def write_rgb48(path: Path, values: np.ndarray) -> None:
    """Writes a PNG with 16 bits per channel, which Pillow cannot do."""
    import struct
    import zlib

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">II5B", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    blocks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(blocks))


def test_sixteen_bits_a_channel(tmp_path: Path) -> None:
    write_rgb48(tmp_path / "a.png", COLOURS.astype(np.uint16) * 257)
    assert np.array_equal(read_image(tmp_path / "a.png"), COLOURS)


def test_a_folder_of_sixteen_bit_grey(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(np.full((6, 8), 10_000 * i, np.uint16)).save(tmp_path / f"{i}.png")
    (batch,) = open_video(tmp_path, FrameSampling(max_fps=None)).batches(4, 8)
    assert batch[:, 0, 0, 0].tolist() == [0, 39, 78, 117]


def test_upright_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(COLOURS, -1))


def test_damaged_images(tmp_path: Path) -> None:
    """With flipped bytes, cuts and zeroed blocks, every format gives an image or an error of one line."""
    originals = []
    for suffix, image, _ in KINDS.values():
        image.save(tmp_path / f"a.{suffix}", quality=90)
        originals.append((suffix, (tmp_path / f"a.{suffix}").read_bytes()))
    read, lines = 0, []
    for seed in range(300):
        rng = random.Random(seed)
        suffix, raw = rng.choice(originals)
        data = bytearray(raw)
        place = rng.randrange(len(data))
        if seed % 3 == 0:
            del data[place:]
        elif seed % 3 == 1:
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            data[place : place + 40] = rng.choice([bytes(40), b"\xff" * 40])
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(data)
        try:
            assert read_image(path).dtype == np.uint8
            read += 1
        except UserError as e:
            lines.append(str(e))
    assert min(read, len(lines)) > 30
    told = ("not an image that can be read", "more pixels than can be read", "pixels, more than can be read")
    assert all("\n" not in line and any(words in line for words in told) for line in lines)
