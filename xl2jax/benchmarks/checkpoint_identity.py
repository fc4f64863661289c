"""Which checkpoint a run was made with, told from its files before any of it is loaded."""

from __future__ import annotations

from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.prompt import PromptTokenizer
from xl2jax.training.fingerprint import digest, weights_fingerprint


def files_identity(checkpoint: str) -> str:
    """A hash of a checkpoint's config, tokenizer and samples of its weights, which takes about a second.

    The same parameters in another layout have another hash, unlike `Model.fingerprint`. Raises UserError where the
    checkpoint does not exist or cannot be read.
    """
    folder = find_checkpoint(checkpoint)
    config = stored_config(folder)
    tokenizer = PromptTokenizer.load(folder, config.llm.vocab)
    return digest(config, tokenizer.tokenizer.to_str(), weights_fingerprint(folder))
