"""The identity of a run: everything that its result depends on.

It is stored with every checkpoint and compared when a run resumes. It covers contents and not paths: the checkpoint,
the data and the output folder may move.
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

# Settings that may differ when a run resumes. For paths, the contents are compared instead.
MAY_DIFFER = {
    "output", "fsdp", "tensor", "coordinator", "processes", "process", "workers", "threads", "save_every", "keep",
    "export", "export_dtype", "tensorboard", "wandb", "dry_run", "validate_data", "preset", "micro_batch", "checkpoint",
    "data", "media_root", "strict", "compile_cache",
    "weights",  # compared as a part of the model, since a checkpoint may be quantised already
}  # fmt: skip
_DESCRIPTIONS = {
    "weights": "other weights in --checkpoint",
    "model": "another config.json in --checkpoint, or other --weights",
    "tokenizer": "another tokenizer in --checkpoint",
    "format": "another version of this program",
}


def settings_of(
    config: TrainConfig, model: VideoXL2Config, tokenizer: PromptTokenizer, checkpoint: Path
) -> dict[str, str]:
    """The identity without the data. Reads a small part of the weights."""
    settings = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in MAY_DIFFER}
    return {
        **settings,
        "format": "3",
        "model": digest(*filter(None, (model, model.llm.weights))),
        "tokenizer": digest(tokenizer.tokenizer.to_str()),
        "weights": weights_fingerprint(checkpoint),
    }


def refuse_other_settings(output: Path, stored: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Raises UserError, which names the differences, if a stored identity differs from `settings`."""
    changed = [k for k in sorted(settings) if stored.get(k) != settings[k]]
    if changed:
        changes = ", ".join(_DESCRIPTIONS.get(k, f"{k} {stored.get(k)} -> {settings[k]}") for k in changed)
        raise UserError(f"{output}: holds a run with other settings ({changes}); choose another --output")


def order_digest(plan: Sequence[Sequence[MicroBatch]]) -> str:
    """Hash of the samples of every step. It does not depend on the size of the micro-batches."""
    return digest(*([row for micro in step for row in micro.rows if row] for step in plan))
