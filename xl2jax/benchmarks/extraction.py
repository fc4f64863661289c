"""The answer in a model's text, as upstream and as lmms-eval 0.7.3 find it. Every rule takes time linear in the text.

Oddities are kept: a published score contains them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

VIDEOMME_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    # Upstream's list lacks two commas, so that Python glues these pairs together.
    "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip
LONGVIDEOBENCH_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    "The best option is", "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


def first_letter(text: str, letters: str, prefixes: Sequence[str]) -> str:
    """Upstream's rule for Video-MME and LongVideoBench: the first of `letters` anywhere, after `prefixes` are deleted."""
    text = text.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    return next((c for c in text if c in letters), "")


def before_bracket(text: str) -> str:
    """Upstream's rule for MLVU: the character before the first ")", or the whole text."""
    text = text.strip()
    at = text.find(")")
    return text if at < 0 else text[max(at - 1, 0) : at]


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MAX_PERIODS = 32
"""Upstream passes a regular expression's flag in place of a count, so that at most this many periods are deleted."""


def lvbench_answer(text: str) -> str:
    """Upstream's rule for LVBench: a letter A to E, or the normalised text where it finds none."""
    text = text.strip()
    rest = text[2:].lstrip()
    if text[:1].upper() in tuple("ABCDE") and text[1:2] == "." and rest and "\n" not in rest:
        return text[0].upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        deleted = thousands or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=_MAX_PERIODS)
    for mark in "'\")(":
        cleaned = cleaned.strip(mark)
    cleaned = cleaned.strip().lower()
    letter = re.search(r"\b([a-e])\b", cleaned)
    return letter[1].upper() if letter else cleaned


_PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
_FORMATS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))


def option_letter(text: str, choices: str = "ABCD") -> str:
    """The rule that lmms-eval 0.7.3 shares between tasks: the candidate with the highest priority, "" without any.

    Later candidates win among those of one priority.
    """
    if not text.strip():
        return ""
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found = list(_candidates(text, choices))
    if not found:
        found = [(letter, text.rfind(letter), 0) for letter in choices if letter in text]
    return max(found, key=lambda c: (c[2], c[1]))[0] if found else ""


def _candidates(text: str, choices: str) -> Iterator[tuple[str, int, int]]:
    """(letter, position, priority) of letters in a form that marks an answer."""
    for form, priority in _FORMATS:
        for letter in choices:
            at = text.rfind(form.format(letter))
            if at >= 0:
                yield letter, at, priority
    lower = text.lower()
    for phrase in _PHRASES:
        start = lower.find(phrase)
        if start >= 0:
            for letter in choices:
                at = text.find(letter, start + len(phrase))
                if at >= 0:
                    yield letter, at, 7
    stripped = text.strip()
    for letter in choices:
        if stripped.startswith(letter) and not stripped[1:2].isalpha():
            yield letter, 0, 10
        if stripped.endswith(letter) and not stripped[-2:-1].isalpha():
            yield letter, len(stripped) - 1, 9


REASONING_TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))


def strip_reasoning(text: str) -> str:
    """Removes blocks between reasoning tags, as lmms-eval's command line does by default before it scores."""
    for start, end in REASONING_TAGS:
        text = _without_blocks(text, start, end)
        if start not in text:  # some chat templates open the block in the prompt, so that only its end is in the text
            text = text.rpartition(end)[2]
    return text.strip()


def _without_blocks(text: str, start: str, end: str) -> str:
    """Removes the first block again and again. What a removal joins may be a tag in turn."""
    kept: list[str] = []
    at, seam = 0, len(start) - 1
    while True:
        before = kept[len(kept) - min(seam, len(kept)) :]
        joined = "".join([*before, text[at : at + seam]]).find(start)
        first = at + joined - len(before) if joined >= 0 else text.find(start, at)
        last = text.find(end, first + len(start)) if joined >= 0 or first >= 0 else -1
        if last < 0:
            return "".join([*kept, text[at:]])
        if joined >= 0:
            del kept[len(kept) - max(at - first, 0) :]
        kept.extend(text[at:first] if first > at else "")
        at = last + len(end)


def rewrite_times(text: str) -> str:
    """Upstream's rewriting of a prompt: each `mm:ss`, wherever it stands, becomes `N seconds`."""
    for time in re.findall(r"\d{2}:\d{2}", text):
        minutes, seconds = map(int, time.split(":"))
        text = text.replace(time, f"{60 * minutes + seconds} seconds")
    return text
