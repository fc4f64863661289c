from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from damage import damaged_json, outcome

from xl2jax.demo import make_tokenizer
from xl2jax.errors import UserError
from xl2jax.prompt import PREFIX, PromptTokenizer, suffix, time_text


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(make_tokenizer())


def test_prompt_text(tokenizer: PromptTokenizer) -> None:
    """The parts put together are the template of the released model."""
    part = suffix(tokenizer, "What happens?")
    whole = tokenizer.tokenizer.decode(tokenizer.encode(PREFIX) + part.ids, skip_special_tokens=False)
    assert whole == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(part.ids[part.first : part.last]) == "What happens?"


def test_times(tokenizer: PromptTokenizer) -> None:
    assert [time_text(t) for t in (0.0, 12.0, 7.3)] == ["Time 0.0s:", "Time 12.0s:", "Time 7.3s:"]
    ids = tokenizer.time_ids([0.0, 0.2, 0.5, 0.8, 10.0, 11.0, 12.0, 13.0])
    assert [tokenizer.decode(i) for i in ids] == ["Time 0.0s:", "Time 10.0s:"]
    assert len(ids[1]) == len(ids[0]) + 1  # digits are tokens


def test_earlier_turns_are_text(tokenizer: PromptTokenizer) -> None:
    part = suffix(tokenizer, "And then?", [("Who?", "A cat.")])
    text = tokenizer.tokenizer.decode(part.ids, skip_special_tokens=False)
    assert text == (
        "\nWho?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(part.ids[part.first : part.last]) == "And then?"


def test_empty_question(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(UserError, match="question is empty"):
        suffix(tokenizer, " \n")


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer.json"):
        PromptTokenizer.load(tmp_path, 1000)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="the model's vocabulary has 100"):
        PromptTokenizer.load(tmp_path, 100)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"lacks the special token <\|im_end\|>"):
        PromptTokenizer.load(tmp_path, 1000)
    for text in (b"{}", b"", b"[" * 100_000, b"\xff", b"null", b'{"model": ' + b"1" * 5000 + b"}"):
        (tmp_path / "tokenizer.json").write_bytes(text)
        with pytest.raises(UserError, match="the tokenizer cannot be read") as e:
            PromptTokenizer.load(tmp_path, 1000)
        assert len(str(e.value)) < 400


def test_fuzzed_tokenizers(tmp_path: Path) -> None:
    """A damaged tokenizer is refused in one line, or it reads and writes text."""
    whole = make_tokenizer().to_str().encode()
    for seed in range(100):
        (tmp_path / "tokenizer.json").write_bytes(damaged_json(whole, random.Random(seed)))
        tokenizer, _ = outcome(lambda: PromptTokenizer.load(tmp_path, 1000))
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("What happens at 12.5s? 日本"))


def slow_files(folder: Path) -> None:
    """vocab.json and merges.txt alone, as older checkpoints have them."""
    raw = json.loads(make_tokenizer().to_str())
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {t["content"]: t["id"] for t in raw["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in added.items()},
    }))  # fmt: skip


def test_slow_tokenizer_files(tmp_path: Path) -> None:
    slow_files(tmp_path)
    slow = PromptTokenizer.load(tmp_path, 1000)
    text = PREFIX + "What happens at 12.5s?"
    assert slow.encode(text) == PromptTokenizer(make_tokenizer()).encode(text)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_slow_tokenizer_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    slow_files(tmp_path)
    if name != "special_tokens_map.json":  # which transformers reads only where the others say nothing
        (tmp_path / name).write_bytes(b"[\xff")
        with pytest.raises(UserError, match="the tokenizer cannot be read|lacks the special token"):
            PromptTokenizer.load(tmp_path, 1000)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe or a device"):
        PromptTokenizer.load(tmp_path, 1000)
