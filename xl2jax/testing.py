"""For tests of code that uses xl2jax: small checkpoints with random weights, and video clips.

make_checkpoint(folder, xl2jax.PRESETS["tiny"])
write_clip(folder / "clip.mp4", seconds=4, width=96, height=64)
xl2jax.load(folder).watch(folder / "clip.mp4")
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES
from xl2jax.checkpoint.torch_folder import write_torch
from xl2jax.config import VideoXL2Config
from xl2jax.evaluation.questions import corpus
from xl2jax.prompt import END_OF_TEXT, IM_END, IM_START
from xl2jax.video.writer import write_frames

_COLOURS = ((220, 40, 40), (40, 90, 220), (40, 170, 70), (235, 200, 40))


def shape_frame(t: float, width: int, height: int) -> np.ndarray:
    """RGB uint8 [height, width, 3] at `t` seconds: coloured shapes that move over a gradient."""
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
    """Writes `shape_frame` as a video file, the same bytes each time.

    The suffix of `path` determines the container. Width and height are even.
    """
    write_frames(path, (shape_frame(i / fps, width, height) for i in range(round(seconds * fps))), fps, codec=codec)


def make_tokenizer(merges: int = 256) -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation (single digits) and special tokens.

    Its merges are trained on the questions and times of `xl2jax.evaluation.questions`.
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
    folder: Path,
    config: VideoXL2Config,
    *,
    seed: int = 0,
    dtype: str = "float32",
    embedding_std: float = 0.02,
    branch_scale: float = 1.0,
) -> None:
    """Writes random weights in the PyTorch layout, with the tokenizer of `make_tokenizer`.

    Weights are normal with variance 1 / fan-in, biases are zero, norms are one. `seed` determines every value.

    Args:
      folder: it must not exist.
      config: the vocabulary size is replaced by the tokenizer's.
      dtype: of the stored weights: float32, bfloat16 or float16.
      embedding_std: standard deviation of the embeddings of tokens and positions.
      branch_scale: factor on the weights of the last layer of every residual branch.

    Raises UserError if the folder exists or cannot be written.
    """
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab_size(with_added_tokens=True)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=vocab))

    def read(entry: Entry) -> np.ndarray:
        rng = np.random.default_rng([seed, *entry.name.encode()])
        if entry.name.endswith("scale"):
            value = np.ones(entry.shape)
        elif entry.name.endswith("bias"):
            value = np.zeros(entry.shape)
        else:
            fan_in = 1 if "embed" in entry.name.rsplit(".", 1)[1] else math.prod(entry.shape[:-1])
            value = rng.standard_normal(entry.shape) * (embedding_std if fan_in == 1 else fan_in**-0.5)
            if entry.name.endswith(_BRANCH_ENDS) and not entry.name.startswith("projector"):
                value *= branch_scale
        return value.astype(DTYPES[DTYPE_NAMES[dtype]])

    write_torch(folder, config, read, dtype)
    tokenizer.save(str(folder / "tokenizer.json"))
