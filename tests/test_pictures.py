"""Pictures in tiles: the grid, resizing and cutting, against upstream's outputs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from xl2jax.config import GRIDS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.inference.store import content_hash
from xl2jax.video.image_files import padded_to_square
from xl2jax.video.pictures import Picture, cut, fit


def views(picture: np.ndarray, tile: int, grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The tiles as upstream stores them, behind the view of the whole picture: [1 + n, 3, tile, tile]."""
    base = np.asarray(Image.fromarray(picture).resize((tile, tile), Image.Resampling.BICUBIC))
    return np.concatenate([base[None], cut(picture, tile, grids)]).transpose(0, 3, 1, 2)


def formula(width: int, height: int) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :3]
    return np.floor(127.5 * (1 + np.sin(0.11 * x * (1 + 0.3 * c)) * np.cos(0.07 * y))).astype(np.uint8)


def test_grids_are_upstreams(goldens: Path) -> None:
    case = json.loads((goldens / "images_grid.json").read_text())
    for size in case["sizes"]:
        placed = fit(size["width"], size["height"], case["tile"], GRIDS)
        assert placed.grid == (size["columns"], size["rows"]), size
        assert [list(placed.size), list(placed.corner)] == [size["resized"], size["paste"]], size


def test_large_tiles_are_upstreams(goldens: Path) -> None:
    case = json.loads((goldens / "images_grid.json").read_text())
    stored = load_file(goldens / "images_preprocess.safetensors")
    for name, about in case["pictures"].items():
        width, height = map(int, name.split("x"))
        actual = views(formula(width, height), case["tile"], GRIDS)
        assert len(actual) == about["views"]
        assert np.array_equal(actual[..., ::24, ::24], stored[name])
        assert hashlib.sha256(np.ascontiguousarray(actual).tobytes()).hexdigest() == about["sha256"]


def test_small_tiles_are_upstreams(goldens: Path) -> None:
    folder = goldens / "images_tiny"
    config = VideoXL2Config.from_hf(folder / "checkpoint")
    stored = load_file(folder / "expected" / "preprocess.safetensors")
    for path in (folder / "pictures").glob("*.png"):
        picture = Picture.read(path).pixels
        actual = views(picture, config.vision.image_size, config.grids())
        assert np.array_equal(actual, stored[f"{path.stem}_views"])
        square = Image.fromarray(padded_to_square(picture)).resize((70, 70), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(square).transpose(2, 0, 1), stored[f"{path.stem}_square"])


def test_pixels_are_upstreams(goldens: Path) -> None:
    from xl2jax.models.video_xl2 import normalise

    stored = load_file(goldens / "images_tiny" / "expected" / "preprocess.safetensors")["pixel_of_code"]
    assert np.abs(np.asarray(normalise(jax.numpy.arange(256, dtype=np.uint8))) - stored).max() < 2e-7


@pytest.mark.parametrize(
    ("points", "grids"),
    [
        ("(1x1),...,(2x3)", ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))),
        ([[56, 112], [112, 56]], ((1, 2), (2, 1))),
        ("[[56, 112], [112, 56]]", ((1, 2), (2, 1))),
        (None, GRIDS),
    ],
)
def test_forms_of_pinpoints(copied: Path, points: object, grids: tuple[tuple[int, int], ...]) -> None:
    write_points(copied, points, scale=70 / 56)
    assert VideoXL2Config.from_hf(copied).grids() == grids


def write_points(folder: Path, points: object, scale: float = 1.0) -> None:
    text = json.dumps(points)
    if scale != 1.0:
        text = text.replace("112", "140").replace("56", "70")
    raw = json.loads((folder / "config.json").read_text()) | {"image_grid_pinpoints": json.loads(text)}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("points", ["(axb)", "(1x1)...(99x99)", [[70, 71]], [[0, 70]], "", [], "(2x2)...(1x1)"])
def test_pinpoints_that_name_no_grids_are_refused(copied: Path, points: object) -> None:
    write_points(copied, points)
    with pytest.raises(UserError, match="image_grid_pinpoints"):
        VideoXL2Config.from_hf(copied)


def test_another_form_of_pictures_is_refused_only_when_it_is_asked_for(copied: Path) -> None:
    raw = json.loads((copied / "config.json").read_text()) | {"mm_patch_merge_type": "spatial_unpad"}
    (copied / "config.json").write_text(json.dumps(raw))
    config = VideoXL2Config.from_hf(copied)
    with pytest.raises(UserError, match="unires"):
        config.grids()


def test_photos_are_upright_and_animations_are_refused(tmp_path: Path) -> None:
    photo = Image.fromarray(formula(40, 20))
    for suffix in ("webp", "avif", "png", "jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        photo.save(tmp_path / f"photo.{suffix}", exif=exif)
        read = Picture.read(tmp_path / f"photo.{suffix}").pixels
        assert read.shape == (40, 20, 3)
        with Image.open(tmp_path / f"photo.{suffix}") as opened:
            assert np.array_equal(Picture.of(opened, 1).pixels, read)
    for suffix in ("gif", "webp", "png", "tiff"):
        file = tmp_path / f"moving.{suffix}"
        photo.save(file, save_all=True, append_images=[photo.rotate(180)])
        with pytest.raises(UserError, match="holds several images"):
            Picture.read(file)


def test_a_photo_with_a_smaller_copy_is_a_picture(tmp_path: Path) -> None:
    photo = Image.fromarray(formula(40, 20))
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[photo.resize((20, 10))])
    assert Picture.read(tmp_path / "photo.jpg").pixels.shape == (20, 40, 3)


def test_bad_pictures_end_in_one_line(tmp_path: Path) -> None:
    heic = tmp_path / "photo.heic"
    heic.write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(64))
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(bomb)
    for path, words in [
        (heic, "convert it"),
        (bomb, "pixels|bomb"),
        (tmp_path, "a folder"),
        (tmp_path / "no", "no such"),
    ]:
        with pytest.raises(UserError, match=words) as e:
            Picture.read(path)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="uint8"):
        Picture.of(np.zeros((4, 4, 3)), 1)


@pytest.mark.parametrize("form", ["EPS", "PPM", "TGA", "JPEG2000", "ICO"])
def test_formats_that_are_not_promised_are_refused(tmp_path: Path, form: str) -> None:
    """Pillow would give an EPS file to Ghostscript."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", form)
    with pytest.raises(UserError, match="its format is not known"):
        Picture.read(tmp_path / "a.png")


def test_frames_whose_names_are_not_utf8_have_a_hash(tmp_path: Path) -> None:
    for name in (b"1.png", b"l\xe9.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / os.fsdecode(name), "PNG")
    one = content_hash(tmp_path)
    (tmp_path / os.fsdecode(b"l\xe9.png")).rename(tmp_path / os.fsdecode(b"l\xe8.png"))
    assert content_hash(tmp_path) != one
