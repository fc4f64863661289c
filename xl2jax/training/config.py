"""The configuration of a training run: one flat dataclass with presets and checks."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro

from xl2jax.config import Weights
from xl2jax.errors import UserError
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.param_tree import is_quantized
from xl2jax.system.atomic import check_folder_target
from xl2jax.video.frame_sampling import FrameSampling, FrameTimes

type Preset = Literal["stage1", "stage2", "stage3", "stage4"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tunes Video-XL-2. The defaults shown here are those of the preset."""

    checkpoint: str
    """Checkpoint to start from: a PyTorch folder, an Orbax folder or a hub id."""
    data: Path
    """YAML file that lists data sets, or one JSON file of records."""
    output: Path
    """Folder for checkpoints and logs. If it holds a run, that run is continued."""
    preset: Preset = "stage4"
    """stage1 trains DTS (with the language loss, as upstream's reconstruction loss is not public); stage2 trains the
    projector; stage3 trains everything on up to 16 frames; stage4 trains everything on up to 150 frames."""
    media_root: Path | None = None
    """Folder that media paths are relative to; by default the folder of each JSON file."""

    fps: float = 1.0
    max_fps: int | None = 4
    max_frames: int = 150
    frame_times: FrameTimes = "auto"
    """upstream gives the model frame number / rate; auto gives it presentation times if the two differ."""
    max_length: int = 6000
    """Limit on the tokens of a sample; the rest is cut off."""
    packing: bool = False
    """Packs several samples into one row of up to --max-length tokens."""

    train: tuple[str, ...] | None = None
    """Name patterns of the parameters to train, e.g. 'dts.*' 'projector.*'. By default all parameters train, or with
    --lora-rank only the adapters."""
    freeze: tuple[str, ...] = ()
    """Name patterns of parameters that do not train; they override --train."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the LLM's linear layers, which are then frozen (upstream: 64). 0: no adapters."""
    lora_alpha: float = 16.0
    weights: Weights | None = None
    """Quantises the LLM's matrices, which stay frozen, to 8 or 4 bits; needs --lora-rank. The adapters keep their dtype."""

    learning_rate: float = 1e-5
    rates: tuple[str, ...] = ()
    """PATTERN=RATE: peak learning rates of some parameters, e.g. 'vision.*=2e-6'. The last match applies."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.03
    """Share of the steps during which the learning rate rises from 0."""
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    """Limit on the number of steps. The learning rate schedule ends there too."""
    global_batch: int = 256
    """Samples (with --packing: rows) of an optimizer step."""
    micro_batch: int = 1
    """Rows that a device processes at once. Gradients are accumulated until --global-batch is reached."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the forward and backward passes and of frozen parameters. Trained parameters, their gradients and their
    optimizer state are always float32: in bfloat16 most steps would round to no change."""
    remat: bool = True
    """Recomputes the activations of each layer in the backward pass."""
    seed: int = 0

    fsdp: int | None = None
    """Number of devices over which parameters are split; by default all devices divided by --tensor."""
    tensor: int = 1
    """Number of devices over which each layer is split: its heads, the columns of its MLP, and the vocabulary."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if several processes train together."""
    processes: int | None = None
    """How many processes these are."""
    process: int | None = None
    """The number of this one, from 0."""

    workers: int = 0
    """Processes that measure the data before training and read it during training; 0 uses threads of this process."""
    threads: int = 4
    """Threads in each of these processes."""

    save_every: int = 200
    """Steps between checkpoints. The last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    export: Path | None = None
    """Folder to which the result is written in the PyTorch layout; it must not exist."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tensorboard: bool = True
    compile_cache: bool = True
    """Stores compiled programs, so that the next run starts sooner (not with --coordinator)."""
    wandb: str | None = None
    """Project on Weights & Biases to log to."""

    dry_run: bool = False
    """Prints the plan and exits before weights or media are read."""
    strict: bool = False
    """Stops with an error if a sample cannot be used, instead of skipping it."""
    validate_data: bool = False
    """Reads all data once, prints a report and exits."""

    def sampling(self) -> FrameSampling:
        """The rule by which frames are chosen."""
        return FrameSampling(self.fps, self.max_fps, self.max_frames, self.frame_times)

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters to add, or None."""
        return LoRAConfig(self.lora_rank, self.lora_alpha) if self.lora_rank else None

    def check(self) -> None:
        """Raises UserError for invalid values. Reads no files."""
        self.sampling()
        at_least = {
            "max_length": 1, "lora_rank": 0, "epochs": 1, "global_batch": 1, "micro_batch": 1, "workers": 0,
            "threads": 1, "save_every": 1, "keep": 1, "seed": 0, "tensor": 1,
        }  # fmt: skip
        for name, minimum in at_least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"--{name.replace('_', '-')} must be {minimum} or more, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"--max-steps must be 1 or more, not {self.max_steps}")
        for name in ("learning_rate", "eps", "clip_norm", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay must be 0 or more, not {self.weight_decay}")
        if self.weights is not None and not self.lora_rank:
            raise UserError(
                f"--weights {self.weights} needs --lora-rank: quantised matrices cannot be trained themselves"
            )
        self.part_rates()
        are_set = [x is not None for x in (self.coordinator, self.processes, self.process)]
        if any(are_set) and not all(are_set):
            raise UserError("--coordinator, --processes and --process must be given together")
        if self.export is not None:
            check_folder_target(self.export)

    def part_rates(self) -> list[tuple[str, float]]:
        """`rates` as (pattern, peak learning rate) pairs. Raises UserError for a malformed entry."""
        out = []
        for text in self.rates:
            pattern, _, rate = text.rpartition("=")
            try:
                value = float(rate)
            except ValueError:
                value = -1.0
            if not pattern or not 0 <= value < math.inf:
                raise UserError(f"--rates {text!r} is not PATTERN=RATE")
            out.append((pattern, value))
        return out


_EVERYTHING = TrainConfig(checkpoint=tyro.MISSING, data=tyro.MISSING, output=tyro.MISSING)

# Stages 3 and 4 follow upstream's scripts. Stages 1 and 2 are not public; their learning rate is LLaVA's for alignment.
PRESETS: Mapping[str, TrainConfig] = {
    "stage1": dataclasses.replace(
        _EVERYTHING, preset="stage1", max_frames=16, max_length=8192, train=("dts.*",), learning_rate=1e-3
    ),
    "stage2": dataclasses.replace(
        _EVERYTHING, preset="stage2", max_frames=16, max_length=8192, train=("projector.*",), learning_rate=1e-3
    ),
    "stage3": dataclasses.replace(_EVERYTHING, preset="stage3", max_frames=16, max_length=8192),
    "stage4": _EVERYTHING,
}


def trained_names(config: TrainConfig, names: Sequence[str]) -> list[str]:
    """Those of the dotted names whose parameters train.

    Raises:
      UserError: a pattern matches no parameter, --train includes a weight that LoRA freezes, or nothing is left.
    """

    def matching(patterns: Sequence[str], flag: str) -> set[str]:
        out: set[str] = set()
        for pattern in patterns:
            matches = {n for n in names if fnmatch.fnmatchcase(n, pattern)}
            if not matches:
                raise UserError(f"{flag} {pattern!r} matches no parameter (names look like {names[0]})")
            out |= matches
        return out

    adapters = {n for n in names if n.rpartition(".")[2] in ("lora_a", "lora_b")}
    adapted = {n.rpartition(".")[0] + ".kernel" for n in adapters} | {n for n in names if is_quantized(n)}
    chosen = config.train if config.train is not None else (() if config.lora else ("*",))
    wanted = matching(chosen, "--train")
    if wanted & adapted and config.train is not None:
        name = min(wanted & adapted)
        reason = "is quantised and so cannot be trained" if is_quantized(name) else "--lora-rank freezes"
        raise UserError(f"--train includes {name}, which {reason}")
    wanted = (wanted | adapters) - matching(config.freeze, "--freeze")
    matching([p for p, _ in config.part_rates()], "--rates")
    if not wanted:
        raise UserError("nothing is left to train")
    return [n for n in names if n in wanted]
