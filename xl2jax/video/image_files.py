"""Reads image files as RGB frames, and lists the images of a folder."""

from __future__ import annotations

import collections
import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from xl2jax.errors import UserError, first_line
from xl2jax.system.schema import require_regular, unreadable
from xl2jax.system.terminal import machine_fault
from xl2jax.video.containers import MAX_PIXELS
from xl2jax.video.readers import SPAN_FRAMES, Reader

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_OTHER_IMAGES = {".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw"}
_VIDEOS = {
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".flv", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".3gp",
    ".ogv", ".asf", ".wmv",
}  # fmt: skip

# Pillow warns of pictures that are large, but not too large for MAX_PIXELS.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow knows others too, of which EPS would run Ghostscript on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")


class ImageReader(Reader):
    """A sequence of image files, one per frame, at `fps` frames a second. `squares`: they are padded to grey squares."""

    def __init__(self, files: Sequence[Path], fps: float, max_pixels: int | None = None, *, squares: bool = False):
        self._files, self._max_pixels, self._squares = files, max_pixels, squares
        self.total, self.fps = len(files), fps

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return np.split(indices, range(SPAN_FRAMES, len(indices), SPAN_FRAMES))

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        previous, frame = -1, np.empty(0)
        for i in indices.tolist():
            if i != previous:
                previous, frame = i, read_image(self._files[i], self._max_pixels, still=self._squares)
                frame = padded_to_square(frame) if self._squares else frame
            yield frame


def read_image(path: Path, max_pixels: int | None = None, *, still: bool = False) -> np.ndarray:
    """uint8 RGB [H, W, 3], rotated upright. 16-bit grey is scaled to 8 bits, and transparency is dropped.

    Raises:
      UserError: the file is not an image, is damaged, or has more than `max_pixels`, by default `MAX_PIXELS`. With
        `still` it is also refused where it holds several images, such as an animation.
    """
    with _opened(path, max_pixels, still) as image:
        return rgb_pixels(image)


def decode_image(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """`read_image` of the bytes of a JPEG, PNG or WebP file."""
    with _reading(io.BytesIO(data), "the image", max_pixels, False, ("JPEG", "PNG", "WEBP")) as image:
        return rgb_pixels(image)


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image as `read_image` gives them."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I" or upright.mode.startswith("I;16"):  # Pillow would clip values above 255
        grey = np.clip(np.asarray(upright, np.float64), 0, 65535) / 257
        return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(upright.convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the picture that `read_image` gives, read from the head of the file. Raises UserError as it does."""
    with _opened(path, None, True) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int | None, still: bool) -> Iterator[Image.Image]:
    """Opens an image file. Errors of the body of the `with` statement become a UserError too."""
    try:
        require_regular(path)
        with _reading(path, str(path), max_pixels, still, _FORMATS) as image:
            yield image
    except (FileNotFoundError, PermissionError) as e:
        raise unreadable(path, e) from None


@contextlib.contextmanager
def _reading(
    file: Path | io.BytesIO, name: str, max_pixels: int | None, still: bool, formats: tuple[str, ...]
) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > (max_pixels or MAX_PIXELS):
                raise UserError(f"{name}: has {image.width} x {image.height} pixels, more than can be read")
            # Cameras add smaller copies and depth maps to a photo (MPO).
            if still and image.format != "MPO" and getattr(image, "is_animated", False):
                raise UserError(f"{name}: holds several images: give an animation as a video, or one of its images")
            yield image
    except (FileNotFoundError, PermissionError, UserError):
        raise
    except Image.DecompressionBombError:  # twice what Pillow warns of, which is more than MAX_PIXELS
        raise UserError(f"{name}: has more pixels than can be read") from None
    except UnidentifiedImageError:
        kind = Path(name).suffix.lower()
        advice = "convert it to .jpg or .png first" if kind in _OTHER_IMAGES else "its format is not known"
        raise UserError(f"{name}: not an image that can be read ({advice})") from None
    except Exception as e:  # on damaged files Pillow's decoders raise errors of many types
        if machine_fault(e) is not None:
            raise  # the machine ran short; the file may be good
        raise UserError(f"{name}: not an image that can be read ({first_line(e)})") from None


def padded_to_square(image: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3], centred on a grey square, as upstream's benchmarks show pictures."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 127, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in the natural order of their names ("2" before "10"), without hidden files.

    Raises:
      UserError: the folder cannot be listed, or holds no images. The message then says what it holds.
    """

    def natural(path: Path) -> tuple[list[tuple[int, int, str]], str]:
        parts = re.split(r"([0-9]+)", path.name)  # only ASCII digits: int() refuses "²", which Unicode calls a digit
        return [(0, int(s), "") if i % 2 else (1, 0, s) for i, s in enumerate(parts)], path.name

    try:
        files = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file()]
    except OSError as e:
        raise unreadable(folder, e) from None
    images = sorted((p for p in files if p.suffix.lower() in _IMAGES), key=natural)
    if not images:
        raise UserError(f"{folder}: holds no frames ({_contents(files)})")
    return images


def _contents(files: Sequence[Path]) -> str:
    """What a folder without images holds, and what to do about it."""
    videos = sorted(p.name for p in files if p.suffix.lower() in _VIDEOS)
    if videos:
        text = f"a video, {videos[0]}" if len(videos) == 1 else f"{len(videos)} videos, such as {videos[0]}"
        return f"it holds {text}: name that file instead of the folder"
    others = collections.Counter(p.suffix.lower() for p in files if p.suffix.lower() in _OTHER_IMAGES)
    if others:
        text = ", ".join(f"{count} {suffix} files" for suffix, count in others.most_common())
        return f"it holds {text}: convert them to .jpg or .png first"
    return f"no file ends in {', '.join(sorted(_IMAGES))}"
