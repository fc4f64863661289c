"""Answers that are decoded a few tokens at a time, alone or together with others.

The caches of answers that are decoded together lie in rows of the same arrays, so that a program reads the weights once
for all of them and attends to all contexts at once. An answer alone reads its context where it is. Answers join and leave
between two programs: they are copied to rows of other arrays then.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.inference import compiled, memory
from xl2jax.inference.cache import KVCache, RowArray, RowCache
from xl2jax.inference.generate import DecodeState, RowState, Sampling, TokenSampling
from xl2jax.inference.network import Network, layer_view
from xl2jax.inference.session import text_slots
from xl2jax.ops.kv import KVArray, QuantizedKV, kept_channels

STREAM_TOKENS = 8
"""Tokens that are decoded on the device before the host sees them."""

MOST_TOGETHER = 16
"""Answers that one program decodes."""


class Decoding:
    """An answer whose tokens are decoded by `decode_together`.

    Attributes:
      ids: all tokens so far, at first the one that `session.start_answer` sampled.
      finite: whether all logits so far were finite.
      rows, row: where its caches are.
    """

    def __init__(
        self,
        network: Network,
        context: KVCache,
        state: DecodeState,
        *,
        new_tokens: int,
        stop: jax.Array | np.ndarray,
        sampling: TokenSampling,
    ):
        """`state` is that of `session.start_answer`."""
        self.stop = tuple(np.asarray(stop).tolist())
        token, self._done, self.finite, used = jax.device_get(
            (state.token, state.done, state.finite, state.text.global_length)
        )
        self.ids = [int(token)]
        self._new_tokens, self._suffix_tokens = new_tokens, int(used)
        self.slots = context.slots
        self.quantized, self.key_channels = isinstance(context.k, QuantizedKV), kept_channels(context.k)
        self.rows, self.row = _Rows.of_one(network, self, context, state, sampling), 0

    @property
    def finished(self) -> bool:
        """Whether the answer has ended: by a token of `stop`, at `new_tokens`, or because it is not finite."""
        return bool(self._done) or not self.finite or self.limit <= 0

    @property
    def limit(self) -> int:
        """How many more tokens it may have."""
        return self._new_tokens - len(self.ids)

    @property
    def text_tokens(self) -> int:
        """Tokens of the question and the answer that are in the cache: all but the last one."""
        return self._suffix_tokens + len(self.ids) - 1

    def take(self, new: np.ndarray, done: np.ndarray, finite: np.ndarray) -> None:
        """Appends what was decoded."""
        self.ids = self.ids + new.tolist()
        self._done, self.finite = bool(done), bool(finite)

    def close(self) -> None:
        """Leaves its row to others."""
        self.rows.leave(self)


class _Rows:
    """The caches and states of answers that one program decodes.

    Attributes:
      slots: of the contexts.
    """

    def __init__(
        self, network: Network, count: int, contexts: RowCache, slots: int, tokens: int, *, turned: bool = False
    ):
        """Rows without answers. `contexts` has `count` rows, and there is space for `tokens` tokens of text in each.

        `turned`: keys are `TurnedKeys`, those of `contexts` too.
        """
        # An answer that is closed, or that nobody holds any more, leaves its row to others.
        self._answers: list[Callable[[], Decoding | None]] = [_nobody] * count
        self.slots = slots
        self._network, self._contexts, self._turned = network, contexts, turned
        self._state, self._sampling = self._empty(tokens)

    @classmethod
    def of_one(
        cls, network: Network, answer: Decoding, context: KVCache, state: DecodeState, sampling: TokenSampling
    ) -> _Rows:
        """The row of an answer alone, which reads its context where it is."""
        rows = cls(network, 1, _in_one_row(network, context), context.slots, answer.text_tokens + STREAM_TOKENS)
        token, key, done, finite = (x[None] for x in (state.token, state.key, state.done, state.finite))
        started = RowState(token, _in_one_row(network, state.text), key, done, finite)
        settings = Sampling(*(jnp.asarray(x)[None] for x in sampling.traced()))
        rows._put_state((started, settings), 0, 0)
        rows._answers[0] = weakref.ref(answer)
        return rows

    @classmethod
    def of_many(cls, network: Network, answers: Sequence[Decoding]) -> _Rows:
        """Rows for answers that are in other rows, and for some more where the number is no power of two."""
        count, slots = row_count(len(answers)), row_slots(network, max(answer.slots for answer in answers))
        turned = network.layers is not None and network.attention.name == "blockwise"
        contexts = compiled.empty_rows(
            network.config.llm,
            count,
            slots,
            network.dtype,
            quantized=answers[0].quantized,
            key_channels=answers[0].key_channels,
            separate=network.layers is not None,
            turned=turned,
            mesh=network.mesh,
        )
        tokens = max(answer.text_tokens for answer in answers) + STREAM_TOKENS
        rows = cls(network, count, contexts, slots, tokens, turned=turned)
        for answer in answers:
            rows.admit(answer)
        return rows

    @property
    def count(self) -> int:
        return len(self._answers)

    @property
    def running(self) -> set[Decoding]:
        return {a for answer in self._answers if (a := answer()) is not None and not a.finished}

    def leave(self, answer: Decoding) -> None:
        # The row of an answer that has ended may have another one by now.
        if self._answers[answer.row]() is answer:
            self._answers[answer.row] = _nobody

    def admit(self, answer: Decoding) -> None:
        """Copies an answer from its row to one of these that is free."""
        free = next(i for i, a in enumerate(self._answers) if a() not in self.running)
        self._hold_text(answer.text_tokens + STREAM_TOKENS)
        old, at = answer.rows, answer.row
        self._contexts = self._moved(self._contexts, old._contexts, free, at)
        self._put_state((old._state, old._sampling), free, at)
        answer.close()
        self._answers[free], answer.rows, answer.row = weakref.ref(answer), self, free

    def decode(self, answers: Iterable[Decoding], size: int) -> None:
        """Decodes up to `size` tokens of some of the answers. The others stay as they are."""
        answers = list(answers)
        self._hold_text(max(answer.text_tokens for answer in answers) + size)
        limits = np.zeros(self.count, np.int32)
        for answer in answers:
            limits[answer.row] = answer.limit
        self._state, ids, counts = compiled.decode(
            self._network,
            self._network.layers,
            self._contexts,
            self._state,
            limits,
            np.asarray(answers[0].stop, np.int32),
            self._sampling,
            size=size,
        )
        ids, counts, done, finite = jax.device_get((ids, counts, self._state.done, self._state.finite))
        for answer in answers:
            row = answer.row
            answer.take(ids[row, : counts[row]], done[row], finite[row])

    def _empty(self, tokens: int) -> tuple[RowState, Sampling]:
        network = self._network
        self._text_slots = text_slots(network, tokens)
        separate = network.layers is not None
        return compiled.empty_state(
            network.config.llm,
            self.count,
            self._text_slots,
            network.dtype,
            separate=separate,
            turned=self._turned,
            mesh=network.mesh,
        )

    def _hold_text(self, tokens: int) -> None:
        """Makes room for `tokens` tokens of text in each row."""
        if tokens > self._text_slots:
            old = self._state, self._sampling
            self._state, self._sampling = self._empty(tokens)
            for row in range(self.count):
                self._put_state(old, row, row)

    def _put_state(self, source: tuple[RowState, Sampling], row: int, source_row: int) -> None:
        self._state, self._sampling = self._moved((self._state, self._sampling), source, row, source_row)

    def _moved[T](self, target: T, source: T, row: int, source_row: int) -> T:
        layers = None if self._network.layers is not None else self._network.config.llm.layers
        return compiled.move_row(target, source, np.int32(row), np.int32(source_row), layers=layers)


def _nobody() -> None:
    return None


def row_count(answers: int) -> int:
    """Rows of the arrays for so many answers: a power of two, so that few programs are compiled."""
    return 1 << (answers - 1).bit_length()


def row_slots(network: Network, slots: int) -> int:
    """Slots of rows for contexts of up to so many: 2 or 3 times a power of two, so that few programs are compiled.

    CPUs read all slots of an answer, so that there they are no more than the longest context has.
    """
    if network.layers is not None:
        return slots
    power = 1 << (slots - 1).bit_length()
    return 3 * power // 4 if 4 * slots <= 3 * power else power


def _in_one_row(network: Network, cache: KVCache) -> RowCache:
    """A cache [L, K, S, H] as that of one answer, without a copy."""

    def rows(x: KVArray) -> RowArray:
        if network.layers is None:
            return x
        each = (functools.partial(layer_view, at=slice(i, i + 1)) for i in range(len(network.layers)))
        return tuple(jax.tree.map(view, x) for view in each)

    lengths = (x[None] for x in (cache.global_length, cache.visual_start, cache.visual_length))
    return RowCache(rows(cache.k), rows(cache.v), *lengths)


def decode_together(network: Network, answers: Sequence[Decoding], *, size: int = STREAM_TOKENS) -> None:
    """Decodes up to `size` tokens of each answer of a network that has not finished."""
    for together in _groups([answer for answer in answers if not answer.finished]):
        for rows, members in _in_rows(network, together):
            rows.decode(members, size)


def _groups(answers: Sequence[Decoding]) -> list[list[Decoding]]:
    """Answers that may share rows. Those whose contexts are much shorter than others would fill rows with padding."""
    groups: list[list[Decoding]] = []
    for answer in sorted(answers, key=lambda a: -a.slots):
        for group in groups:
            first = group[0]
            padded, used = (len(group) + 1) * first.slots, sum(a.slots for a in group) + answer.slots
            alike = (first.quantized, first.stop) == (answer.quantized, answer.stop)
            if alike and len(group) < MOST_TOGETHER and padded <= 2 * used:
                group.append(answer)
                break
        else:
            groups.append([answer])
    return groups


def _in_rows(network: Network, group: list[Decoding]) -> list[tuple[_Rows, list[Decoding]]]:
    """Brings a group of answers into the same rows, or into several where there is no memory for all of them."""
    count = row_count(len(group))
    for rows in dict.fromkeys(answer.rows for answer in group):
        if rows.count == count and rows.slots >= group[0].slots and rows.running <= set(group):
            for answer in group:
                if answer.rows is not rows:
                    rows.admit(answer)
            return [(rows, group)]
    first = group[0]
    bytes_of = functools.partial(memory.slot_bytes, network.config, network.dtype, tensor=network.tensor)
    slot = bytes_of(quantized=first.quantized, key_channels=first.key_channels)
    text = text_slots(network, max(answer.text_tokens + answer.limit for answer in group))
    need = count * (row_slots(network, first.slots) * slot + text * bytes_of())
    if need > memory.available_bytes(network.mesh) // 2:
        if all(answer.rows is first.rows for answer in group):
            return [(first.rows, group)]  # they stay where they are, beside rows that nobody needs any more
        half = len(group) // 2
        return _in_rows(network, group[:half]) + _in_rows(network, group[half:])
    return [(_Rows.of_many(network, group), group)]


def answer_tokens(
    network: Network,
    context: KVCache,
    state: DecodeState,
    *,
    new_tokens: int,
    stop: jax.Array | np.ndarray,
    sampling: TokenSampling,
) -> Generator[list[int]]:
    """Decodes up to a token of `stop`, at most `new_tokens` tokens. Yields all ids so far every few tokens.

    Raises UserError where the logits are not finite.
    """
    answer = Decoding(network, context, state, new_tokens=new_tokens, stop=stop, sampling=sampling)
    with contextlib.closing(answer):
        while answer.finite:
            yield answer.ids
            if answer.finished:
                return
            decode_together(network, [answer])
    raise network.not_finite("the next token's logits")
