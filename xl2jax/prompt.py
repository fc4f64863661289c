"""Qwen's chat template with a video in it, and the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenizers import Tokenizer

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.schema import is_file, read_bytes

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful assistant."
PREFIX = f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n"


def time_text(seconds: float) -> str:
    """`Time 12.0s:`, which stands before each group's visual tokens."""
    return f"Time {seconds}s:"


class PromptTokenizer:
    """Tokenises text as upstream does: left of the video, each time, and right of it separately."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def load(cls, folder: Path, vocab: int) -> PromptTokenizer:
        """From tokenizer.json, or from vocab.json and merges.txt.

        Raises:
          UserError: no such file, one that cannot be read, or the tokenizer lacks a special token, or knows more
            tokens than the model's `vocab`.
        """
        tokenizer = _read_tokenizer(folder)
        missing = [t for t in (IM_START, IM_END, END_OF_TEXT) if tokenizer.token_to_id(t) is None]
        if missing:
            raise UserError(f"{folder}: the tokenizer lacks the special token {', '.join(missing)}")
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= vocab:
            raise UserError(f"{folder}: the tokenizer's ids go up to {largest}, the model's vocabulary has {vocab}")
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def stop_ids(self) -> list[int]:
        ids = [self.tokenizer.token_to_id(t) for t in (IM_END, END_OF_TEXT)]
        return [i for i in ids if i is not None]

    def time_ids(self, times: list[float]) -> list[list[int]]:
        """Token ids of every group's time, from the times of all frames."""
        return [self.encode(time_text(t)) for t in times[::FRAMES_PER_GROUP]]


_SLOW_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def _read_tokenizer(folder: Path) -> Tokenizer:
    whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    try:
        if is_file(whole):
            return Tokenizer.from_buffer(read_bytes(whole))
        if not all(map(is_file, parts)):
            raise UserError(f"{folder}: no tokenizer.json (nor vocab.json with merges.txt)")
        for name in _SLOW_FILES:
            is_file(folder / name)  # a pipe would block
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except UserError:
        raise
    except Exception as e:  # tokenizers raises bare Exception
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from None


@dataclasses.dataclass(frozen=True)
class Suffix:
    """Tokens right of the video. The question's own are `ids[first:last]`."""

    ids: list[int]
    first: int
    last: int


def suffix(tokenizer: PromptTokenizer, question: str, history: list[tuple[str, str]] | None = None) -> Suffix:
    """Everything behind the video: earlier turns as text (`history`: question, answer), the question."""
    if not question.strip():
        raise UserError("the question is empty")
    head = "\n"
    for asked, answered in history or []:
        head += f"{asked}{IM_END}\n{IM_START}assistant\n{answered}{IM_END}\n{IM_START}user\n"
    tail = f"{IM_END}\n{IM_START}assistant\n"
    ids = tokenizer.encode(head + question + tail)
    from_question = len(tokenizer.encode(question + tail))
    return Suffix(ids, max(len(ids) - from_question, 0), len(ids) - len(tokenizer.encode(tail)))
