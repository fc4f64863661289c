"""An answer in the making, a few tokens at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from xl2jax.inference import session
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.decoding import Decoding, decode_together
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.live import LiveVideo
from xl2jax.inference.network import Network
from xl2jax.inference.progress import AnswerText
from xl2jax.inference.selection import Chunk, RelevanceConfig, choose_context
from xl2jax.inference.video_cache import WatchedVideo
from xl2jax.prompt import PromptTokenizer, Suffix


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, and what it cost."""

    question: str
    text: str
    finish_reason: Literal["stop", "length"]
    """stop: the model ended its answer. length: it was cut off at `max_new_tokens`."""
    new_tokens: int
    suffix_tokens: int
    context_tokens: int
    """Tokens of the cache that this answer read."""
    chunks: list[Chunk]
    timings: dict[str, float]


class Answering:
    """A question whose chunks were chosen and whose answer is decoded with every `step`.

    It keeps the video open until it has `finished` or is closed. `Model.start_answer` makes it.

    Attributes:
      finished: whether the answer has ended. `answer` can then be read.
      chunks: the chunks of the video that the answer reads.
      context_tokens, suffix_tokens: tokens of the cache that it reads, and of the prompt behind the video.
      new_tokens: tokens decoded so far.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: PromptTokenizer,
        video: WatchedVideo | LiveVideo,
        question: str,
        text: Suffix,
        *,
        max_new_tokens: int,
        sampling: TokenSampling,
        seed: int,
        bilevel: BilevelConfig | None,
        relevance: RelevanceConfig,
    ):
        with contextlib.ExitStack() as opened:
            opened.enter_context(video.reading())
            self._question, self._stop = question, frozenset(tokenizer.stop_ids)
            stop = np.asarray(tokenizer.stop_ids, np.int32)
            self._started = time.perf_counter()
            ids = session.suffix_ids(text.ids, text.first, text.last)
            with video.snapshot() as seen:
                context, self.chunks = choose_context(network, seen, question, ids, bilevel, relevance)
                jax.block_until_ready(context)
            self._selected = time.perf_counter()
            state, _ = session.start_answer(
                network, context, ids, new_tokens=max_new_tokens, stop=stop, sampling=sampling, seed=seed
            )
            self._network = network
            self._decoding: Decoding | None = Decoding(
                network, context, state, new_tokens=max_new_tokens, stop=stop, sampling=sampling
            )
            self._text = AnswerText(tokenizer)
            self._ids: list[int] = []
            self._first = self._decoded = 0.0
            self.context_tokens, self.suffix_tokens = int(context.length), len(text.ids)
            self.finished = False
            self._opened = opened.pop_all()

    @property
    def new_tokens(self) -> int:
        return len(self._ids)

    def step(self) -> str:
        """`decode` of this answer alone, and `read`."""
        decode([self])
        return self.read()

    def read(self) -> str:
        """The text that was decoded since it was read last, maybe none.

        Raises UserError where the logits are not finite. The answer is then closed.
        """
        decoding = self._decoding
        assert decoding is not None
        self._decoded = time.perf_counter()
        self._first = self._first or self._decoded
        self._ids = decoding.ids
        if not decoding.finite:
            self.close()
            raise self._network.not_finite("the next token's logits")
        if decoding.finished:
            self.close()
            self.finished = True
        return self._text.add(self._without_stop(), final=self.finished)

    def close(self) -> None:
        """Lets go of the video and of the answer's own memory, whether or not the answer has ended."""
        if self._decoding is not None:
            self._decoding.close()
        self._decoding = None
        self._opened.close()

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        decoding = self._decoded - self._first
        return Answer(
            question=self._question,
            text=self._text.sent,
            finish_reason="stop" if self._ids and self._ids[-1] in self._stop else "length",
            new_tokens=len(self._ids),
            suffix_tokens=self.suffix_tokens,
            context_tokens=self.context_tokens,
            chunks=self.chunks,
            timings={
                "select": self._selected - self._started,
                "question": self._first - self._selected,
                "decode": decoding,
                "decode_tokens_per_s": (len(self._ids) - 1) / decoding if len(self._ids) > 1 else 0.0,
            },
        )

    def _without_stop(self) -> list[int]:
        return self._ids[:-1] if self._ids and self._ids[-1] in self._stop else self._ids


def decode(answers: Sequence[Answering]) -> None:
    """Decodes up to `decoding.STREAM_TOKENS` further tokens of each answer of one model. `Answering.read` gives their text.

    Those whose first token was not read yet, and those that have ended, are left as they are.
    """
    running = [a._decoding for a in answers if a.new_tokens and a._decoding is not None]
    if running:
        decode_together(answers[0]._network, running)
