"""Qwen's chat template around a video, and the tokenizer.

Only the template contains control tokens. Text of users and data sets is always plain text: `<|im_end|>` in a question
is tokenised as its characters.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError, first_line
from xl2jax.system.schema import is_file, read_bytes


class Control(str):
    """The name of a control token. A plain `str` is always text."""

    __slots__ = ()


IM_START, IM_END, END_OF_TEXT = Control("<|im_start|>"), Control("<|im_end|>"), Control("<|endoftext|>")
SYSTEM = "You are a helpful assistant."
PREFIX = (IM_START, "system\n", SYSTEM, IM_END, "\n", IM_START, "user\n")
"""The prompt before the video."""

MAX_TEXT_TOKENS = 32_768
"""Limit on the tokens of a question with its history: the number of positions that Qwen2.5 was trained with."""

type Turn = tuple[str, str] | Mapping[str, str]
"""A (question, answer) pair, or one message {"role": "user" | "assistant", "content": text}."""


def time_text(seconds: float) -> str:
    """The text before each group's visual tokens, such as `Time 12.0s:`."""
    return f"Time {seconds}s:"


class PromptTokenizer:
    """Tokenises text. As upstream does, the text before the video, each time, and the text after it are separate."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._plain = _text_tokenizer(tokenizer)

    @classmethod
    def load(cls, folder: Path, vocab: int) -> PromptTokenizer:
        """Reads tokenizer.json, or vocab.json with merges.txt.

        Raises:
          UserError: the files are missing or cannot be read, the tokenizer lacks a control token, or its largest id is
            not below `vocab`.
        """
        tokenizer = _read_tokenizer(folder)
        missing = [t for t in (IM_START, IM_END, END_OF_TEXT) if tokenizer.token_to_id(t) is None]
        if missing:
            raise UserError(f"{folder}: the tokenizer lacks the special token {', '.join(missing)}")
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= vocab:
            raise UserError(f"{folder}: the tokenizer's ids go up to {largest}, the model's vocabulary has {vocab}")
        try:
            return cls(tokenizer)
        except Exception as e:
            raise _unreadable(folder, e) from None

    def __reduce__(self) -> tuple[type[PromptTokenizer], tuple[Tokenizer]]:
        return PromptTokenizer, (self.tokenizer,)  # a pickled Tokenizer loses `encode_special_tokens`

    def encode(self, *parts: str) -> list[int]:
        """Token ids of text and `Control` tokens. Adjacent pieces of text are joined before they are tokenised."""
        ids: list[int] = []
        for is_control, run in itertools.groupby(parts, lambda part: isinstance(part, Control)):
            if is_control:
                ids += [self._control_id(token) for token in run]
            else:
                ids += self._plain.encode("".join(run), add_special_tokens=False).ids
        return ids

    def _control_id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer lacks the special token {token}")
        return int(number)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        ids = [self.tokenizer.token_to_id(t) for t in (IM_END, END_OF_TEXT)]
        return [i for i in ids if i is not None]

    def time_ids(self, times: list[float]) -> list[list[int]]:
        """Token ids of the time text of each group, from the times of all frames."""
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
            is_file(folder / name)  # refuses a pipe, on which transformers would block
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except UserError:
        raise
    except Exception as e:  # tokenizers raises plain Exception
        raise _unreadable(folder, e) from None


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: the tokenizer cannot be read ({first_line(error)})")


def _text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer that treats the names of control tokens as plain characters."""
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or token["content"] in (IM_START, IM_END, END_OF_TEXT)
    plain = Tokenizer.from_str(json.dumps(raw))
    plain.encode_special_tokens = True
    return plain


@dataclasses.dataclass(frozen=True)
class Suffix:
    """The tokens after the video. The tokens of the question are `ids[first:last]`."""

    ids: list[int]
    first: int
    last: int


def suffix(
    tokenizer: PromptTokenizer, question: str, history: Sequence[Turn] | None = None, lead: str = "\n"
) -> Suffix:
    """The prompt after the video: `lead`, which the video's context ends with; earlier turns as text; the question.

    Raises:
      UserError: the question is empty, not Unicode or too long, or an entry of the history is not a turn.
    """
    if not question.strip() and lead:  # without a lead, a text that may be the question ends with the context
        raise UserError("the question is empty")
    head: list[str] = [lead]
    for earlier, answer in pairs(history or ()):
        head += [earlier, IM_END, "\n", IM_START, "assistant\n", answer, IM_END, "\n", IM_START, "user\n"]
    for text in (question, *head):
        check_unicode(text)
    tail = (IM_END, "\n", IM_START, "assistant\n")
    ids = tokenizer.encode(*head, question, *tail)
    if len(ids) > MAX_TEXT_TOKENS:
        subject = "the question with its history" if history else "the question"
        raise UserError(f"{subject} has {len(ids):,} tokens, more than the {MAX_TEXT_TOKENS:,} that the model can read")
    from_question = len(tokenizer.encode(question, *tail))
    return Suffix(ids, max(len(ids) - from_question, 0), len(ids) - len(tokenizer.encode(*tail)))


def check_unicode(text: str) -> None:
    """Raises UserError for text with lone surrogates, which is how Python represents bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        excerpt = text[max(e.start - 20, 0) : e.end + 10].encode("utf-8", "backslashreplace").decode()
        raise UserError(f"the text is not UTF-8 at character {e.start} ('{excerpt}'): give it in UTF-8") from None


def pairs(history: Sequence[Turn]) -> list[tuple[str, str]]:
    """Earlier turns as (question, answer) pairs. Messages with roles must alternate, beginning with the user.

    Raises:
      UserError: the history has any other form.
    """
    if not any(isinstance(turn, Mapping) for turn in history):
        for turn in history:
            if not (isinstance(turn, (tuple, list)) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
                raise UserError(f"history: {turn!r} is neither a (question, answer) pair nor a message with a role")
        return [(question, answer) for question, answer in history]
    texts = []
    for number, turn in enumerate(history):
        role = ("user", "assistant")[number % 2]
        if not isinstance(turn, Mapping) or turn.get("role") != role or not isinstance(turn.get("content"), str):
            raise UserError(f'history: message {number + 1} is not {{"role": "{role}", "content": text}}')
        texts.append(turn["content"])
    if len(texts) % 2:
        raise UserError("history: the last user message has no answer")
    return list(zip(texts[::2], texts[1::2], strict=True))
