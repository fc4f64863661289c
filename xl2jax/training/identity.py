"""What a run is, as far as its result follows from it: kept with every checkpoint, compared when the run goes on.

Content counts, not place: the checkpoint, the data and the output folder may move, and paths may be spelt otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.prompt import PromptTokenizer
from xl2jax.training.batches import MicroBatch
from xl2jax.training.config import TrainConfig
from xl2jax.training.fingerprint import digest, weights_fingerprint

SAMPLES, ORDER = "samples", "order"

# What may differ between the run that wrote a checkpoint and the one that goes on from it. Of paths the content counts.
FREE = {
    "output", "fsdp", "tensor", "coordinator", "processes", "process", "workers", "threads", "save_every", "keep",
    "export", "export_dtype", "tensorboard", "wandb", "dry_run", "validate_data", "preset", "micro_batch", "checkpoint",
    "data", "media_root", "strict", "compile_cache",
}  # fmt: skip
_WORDS = {
    "weights": "other weights in --checkpoint",
    "model": "another config.json in --checkpoint",
    "tokenizer": "another tokenizer in --checkpoint",
    "format": "another version of this program",
}


def settings_of(
    config: TrainConfig, model: VideoXL2Config, tokenizer: PromptTokenizer, checkpoint: Path
) -> dict[str, str]:
    """All but the data. Reads a small part of the weights."""
    settings = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in FREE}
    return {
        **settings,
        "format": "2",
        "model": digest(model),
        "tokenizer": digest(tokenizer.tokenizer.to_str()),
        "weights": weights_fingerprint(checkpoint),
    }


def refuse_other_settings(output: Path, stored: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Raises UserError that names what differs."""
    changed = [k for k in sorted(settings) if stored.get(k) != settings[k]]
    if changed:
        what = ", ".join(_WORDS.get(k, f"{k} {stored.get(k)} -> {settings[k]}") for k in changed)
        raise UserError(f"{output}: holds a run with other settings ({what}); choose another --output")


def order_digest(plan: Sequence[Sequence[MicroBatch]]) -> str:
    """Of the samples of every step. Into how many micro-batches they are cut does not count."""
    return digest(*([row for micro in step for row in micro.rows if row] for step in plan))
