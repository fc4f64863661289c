"""Things to try the model on without any download: a real H.264 clip, a small random checkpoint.

python -m xl2jax.demo clip build/clip.mp4
python -m xl2jax.demo checkpoint build/random
python -m xl2jax.demo train build/demo        # how the bundled checkpoint was made
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

from xl2jax.checkpoint import DTYPE_NAMES, write_torch
from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.names import Entry
from xl2jax.prompt import END_OF_TEXT, IM_END, IM_START
from xl2jax.synthetic import DatasetArgs, corpus, write_dataset
from xl2jax.tensor_files import DTYPES
from xl2jax.terminal import run_command

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


def make_checkpoint(folder: Path, config: VideoXL2Config, *, seed: int = 0, dtype: str = "float32") -> None:
    """Writes random weights in the PyTorch layout, with `make_tokenizer`'s tokenizer.

    Every value follows from `seed`: normal, scaled by fan-in; norms start at one.
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
            value = rng.standard_normal(entry.shape) * (0.02 if fan_in == 1 else fan_in**-0.5)
        return value.astype(DTYPES[DTYPE_NAMES[dtype]])

    write_torch(folder, config, read, dtype)
    tokenizer.save(str(folder / "tokenizer.json"))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the bundled checkpoint's training: its videos and its optimizer settings."""

    name: str
    data: DatasetArgs
    learning_rate: float
    batch: int
    epochs: int


STAGES = (
    Stage("see", DatasetArgs(Path(), videos=20000, groups=(2,), records=2, turns=6, seed=1), 1e-3, 128, 8),
    Stage("short", DatasetArgs(Path(), videos=8000, groups=(8,), records=6, turns=6, seed=2), 7e-4, 64, 2),
    Stage("long", DatasetArgs(Path(), videos=4000, groups=(16, 64), records=4, turns=8, seed=3), 5e-4, 32, 1),
)


@dataclasses.dataclass(frozen=True)
class ClipArgs:
    """Writes a clip of moving coloured shapes (H.264, 640x360)."""

    path: Annotated[Path, tyro.conf.Positional]
    """File to write."""
    seconds: float = 20.0


@dataclasses.dataclass(frozen=True)
class CheckpointArgs:
    """Writes a checkpoint with random weights."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    preset: str = "small"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Makes the bundled checkpoint: random weights, synthetic videos, one stage of training behind the other."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for data, runs and results; what is already there is not made again."""
    processes: int = 2
    """That write videos, and that read them."""
    stages: tuple[str, ...] = ()
    """Names of the stages to run; all by default."""


def train_demo(args: TrainArgs) -> None:
    """Every stage starts from the one before it; the last one's weights are the bundled checkpoint."""
    from xl2jax.training.config import PRESETS as TRAINING
    from xl2jax.training.run import train

    weights = args.folder / "random"
    if not weights.exists():
        make_checkpoint(weights, PRESETS["demo"])
    unknown = sorted(set(args.stages) - {s.name for s in STAGES})
    if unknown:
        raise UserError(f"--stages: no stage {', '.join(unknown)}")
    for stage in (s for s in STAGES if not args.stages or s.name in args.stages):
        data, result = args.folder / f"data-{stage.name}", args.folder / stage.name
        if not data.exists():
            write_dataset(dataclasses.replace(stage.data, folder=data, processes=args.processes))
        if not result.exists():
            status = train(
                dataclasses.replace(
                    TRAINING["stage4"], checkpoint=str(weights), data=data / "train.json", export=result,
                    output=args.folder / f"run-{stage.name}", fps=1.0, max_fps=None, max_frames=4 * max(stage.data.groups),
                    learning_rate=stage.learning_rate, global_batch=stage.batch, micro_batch=stage.batch,
                    epochs=stage.epochs, warmup=0.05, b2=0.98, weight_decay=0.05, remat=False, save_every=1000,
                    workers=args.processes if args.processes > 2 else 0, threads=2,
                )
            )  # fmt: skip
            if status:
                sys.exit(status)
        weights = result


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"clip": ClipArgs, "checkpoint": CheckpointArgs, "train": TrainArgs}, prog="python -m xl2jax.demo"
    )
    if isinstance(args, TrainArgs):
        train_demo(args)
    elif isinstance(args, ClipArgs):
        args.path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(args.path, args.seconds)
        print(f"wrote {args.path}", file=sys.stderr)
    else:
        make_checkpoint(args.folder, PRESETS[args.preset], seed=args.seed)
        print(f"wrote {args.folder}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
