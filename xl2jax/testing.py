"""Things to try the model on without any download: a real H.264 clip, a small random checkpoint.

python -m xl2jax demo build/random      # the checkpoint
"""

from __future__ import annotations

import dataclasses
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES
from xl2jax.checkpoint.torch_folder import write_torch
from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.evaluation.scenes import corpus
from xl2jax.prompt import END_OF_TEXT, IM_END, IM_START
from xl2jax.system.terminal import run_command

_COLOURS = ((220, 40, 40), (40, 90, 220), (40, 170, 70), (235, 200, 40))


def shape_frame(t: float, width: int, height: int) -> np.ndarray:
    """RGB uint8 [height, width, 3] of second t: coloured shapes that move over a gradient."""
    y, x = np.ogrid[:height, :width]
    shade = 150 + 50 * np.sin(x / 40 + t) * np.cos(y / 30 - t / 2)
    image = Image.fromarray(np.repeat(shade[..., None], 3, axis=2).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    r = height // 8
    for i, colour in enumerate(_COLOURS):
        cx = width / 2 + width / 3 * np.sin(0.5 * t + 1.6 * i)
        cy = height / 2 + height / 3 * np.cos(0.4 * t + 2.1 * i)
        box = (cx - r, cy - r, cx + r, cy + r)
        if i % 2:
            draw.rectangle(box, fill=colour)
        else:
            draw.ellipse(box, fill=colour)
    return np.asarray(image)


def write_clip(
    path: Path, seconds: float = 20.0, *, fps: int = 24, width: int = 640, height: int = 360, codec: str = "libx264"
) -> None:
    """Writes `shape_frame` as a video file; the container follows from the file's suffix.

    H.264 is written with a constant quantiser: libx264's rate control does not give the same bytes each time.
    """
    import av  # not needed to make checkpoints

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"qp": "20"} if codec == "libx264" else {}
        for i in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(shape_frame(i / fps, width, height), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_tokenizer(merges: int = 256) -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation (single digits) and special tokens.

    The merges are learnt from the questions and times that it is meant for.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END_OF_TEXT, IM_START, IM_END)])
    return tokenizer


_BRANCH_ENDS = (".out.kernel", ".fc2.kernel", ".proj_out.kernel", ".o.kernel", ".down.kernel")


def make_checkpoint(
    folder: Path, config: VideoXL2Config, *, seed: int = 0, dtype: str = "float32", embedding: float = 0.02,
    branch: float = 1.0,
) -> None:  # fmt: skip
    """Writes random weights in the PyTorch layout, with `make_tokenizer`'s tokenizer.

    Every value follows from `seed`: normal, scaled by fan-in; norms start at one.

    Args:
      embedding: standard deviation of embeddings (tokens, positions).
      branch: factor on the last layer of every residual branch.
    """
    tokenizer = make_tokenizer()
    tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=tokens))

    def read(entry: Entry) -> np.ndarray:
        rng = np.random.default_rng([seed, *entry.name.encode()])
        if entry.name.endswith("scale"):
            value = np.ones(entry.shape)
        elif entry.name.endswith("bias"):
            value = np.zeros(entry.shape)
        else:
            fan_in = 1 if "embed" in entry.name.rsplit(".", 1)[1] else math.prod(entry.shape[:-1])
            value = rng.standard_normal(entry.shape) * (embedding if fan_in == 1 else fan_in**-0.5)
            if entry.name.endswith(_BRANCH_ENDS) and not entry.name.startswith("projector"):
                value *= branch
        return value.astype(DTYPES[DTYPE_NAMES[dtype]])

    write_torch(folder, config, read, dtype)
    tokenizer.save(str(folder / "tokenizer.json"))


@dataclasses.dataclass(frozen=True)
class CheckpointArgs:
    """Writes a checkpoint with random weights."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    preset: str = "small"
    seed: int = 0


def main() -> None:
    args = tyro.cli(CheckpointArgs, prog="python -m xl2jax demo")
    make_checkpoint(args.folder, PRESETS[args.preset], seed=args.seed)
    print(f"wrote {args.folder}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
