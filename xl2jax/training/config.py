"""What a training run is: one flat dataclass, its presets, its checks."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro

from xl2jax.errors import UserError
from xl2jax.models.lora import LoRAConfig
from xl2jax.system.atomic import check_folder_target
from xl2jax.video.frame_sampling import FrameSampling, FrameTimes

type Preset = Literal["stage1", "stage2", "stage3", "stage4"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tunes Video-XL-2. The defaults shown are those of the preset."""

    checkpoint: str
    """PyTorch folder, Orbax folder or hub id to start from."""
    data: Path
    """YAML of data sets, or one JSON list of records."""
    output: Path
    """Folder of checkpoints and logs. A run found there is continued."""
    preset: Preset = "stage4"
    """stage1: DTS alone (upstream's reconstruction loss is not public: here through the language loss);
    stage2: projector alone; stage3: everything, <= 16 frames; stage4: everything, <= 150 frames."""
    media_root: Path | None = None
    """Where media paths start; by default the folder of each JSON file."""

    fps: float = 1.0
    max_fps: int | None = 4
    max_frames: int = 150
    frame_times: FrameTimes = "auto"
    """auto tells the model the frames' own times where they differ from frame number / rate; upstream never does."""
    max_length: int = 6000
    """Most tokens of a sample; the end beyond them is cut off."""
    packing: bool = False
    """Several samples in one row, up to --max-length."""

    train: tuple[str, ...] | None = None
    """Name patterns of parameters that train, e.g. 'dts.*' 'projector.*'. All by default; with --lora-rank, none
    but the adapters."""
    freeze: tuple[str, ...] = ()
    """Name patterns that do not, whatever --train says."""
    lora_rank: int = 0
    """Rank of adapters on the LLM's linear layers, which are then frozen themselves (upstream: 64). 0: none."""
    lora_alpha: float = 16.0

    learning_rate: float = 1e-5
    rates: tuple[str, ...] = ()
    """PATTERN=RATE: peak learning rates of parts, e.g. 'vision.*=2e-6'. The last that matches counts."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.03
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    """Stops (and plans the schedule) earlier than the epochs would."""
    global_batch: int = 256
    """Samples (rows, where packed) of an optimizer step."""
    micro_batch: int = 1
    """Rows that a device takes at a time; the rest of --global-batch is accumulated."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the forward and backward pass, and of what is frozen. What trains, its gradients' sum and its optimizer state
    are float32: in bfloat16 a step of these rates is less than half the distance to the next number."""
    remat: bool = True
    """Recomputes each layer in the backward pass."""
    seed: int = 0

    fsdp: int | None = None
    """Devices over which parameters are split; all that --tensor leaves by default."""
    tensor: int = 1
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes train together."""
    processes: int | None = None
    process: int | None = None

    workers: int = 0
    """Processes that look at the data before training and read ahead; 0: threads of the training process."""
    threads: int = 4
    """Threads in each of them."""

    save_every: int = 200
    """Steps between checkpoints; the last step is always kept."""
    keep: int = 2
    """Newest checkpoints that stay."""
    export: Path | None = None
    """Folder to write the result to in the PyTorch layout; it must not exist."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tensorboard: bool = True
    compile_cache: bool = True
    """Keeps compiled programs between runs, so that the next one starts sooner (not with --coordinator)."""
    wandb: str | None = None
    """Project to log to."""

    dry_run: bool = False
    """Prints the plan and stops before weights or media are read."""
    strict: bool = False
    """Refuses data of which a sample cannot be used, in place of skipping it."""
    validate_data: bool = False
    """Reads all data once, reports, and stops."""

    def sampling(self) -> FrameSampling:
        return FrameSampling(self.fps, self.max_fps, self.max_frames, self.frame_times)

    @property
    def lora(self) -> LoRAConfig | None:
        return LoRAConfig(self.lora_rank, self.lora_alpha) if self.lora_rank else None

    def check(self) -> None:
        """Raises UserError for values that cannot be, before anything is read."""
        self.sampling()
        at_least = {
            "max_length": 1, "lora_rank": 0, "epochs": 1, "global_batch": 1, "micro_batch": 1, "workers": 0,
            "threads": 1, "save_every": 1, "keep": 1, "seed": 0, "tensor": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(self, name)}")
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
        self.part_rates()
        given = [x is not None for x in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise UserError("--coordinator, --processes and --process go together")
        if self.export is not None:
            check_folder_target(self.export)

    def part_rates(self) -> list[tuple[str, float]]:
        """(pattern, peak rate) pairs of `rates`."""
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

# Stages 3 and 4: upstream's scripts. Stages 1 and 2 are not public; their rate is LLaVA's for alignment.
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
    """The parameters that train, of all dotted names.

    Raises UserError for a pattern that matches nothing, or if nothing is left.
    """

    def matching(patterns: Sequence[str], flag: str) -> set[str]:
        out: set[str] = set()
        for pattern in patterns:
            found = {n for n in names if fnmatch.fnmatchcase(n, pattern)}
            if not found:
                raise UserError(f"{flag} {pattern!r} matches no parameter (names look like {names[0]})")
            out |= found
        return out

    adapters = {n for n in names if n.rpartition(".")[2] in ("lora_a", "lora_b")}
    based = {n.rpartition(".")[0] + ".kernel" for n in adapters}
    chosen = config.train if config.train is not None else (() if config.lora else ("*",))
    wanted = matching(chosen, "--train")
    if wanted & based and config.train is not None:
        raise UserError(f"--train reaches {min(wanted & based)}, which --lora-rank freezes")
    wanted = (wanted | adapters) - matching(config.freeze, "--freeze")
    matching([p for p, _ in config.part_rates()], "--rates")
    if not wanted:
        raise UserError("nothing is left to train")
    return [n for n in names if n in wanted]
