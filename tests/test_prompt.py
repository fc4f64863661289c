from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        PromptTokenizer.load(tmp_path, 1000)


def test_slow_tokenizer_files(tmp_path: Path) -> None:
    """vocab.json and merges.txt alone, as older checkpoints have them."""
    raw = json.loads(make_tokenizer().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {t["content"]: t["id"] for t in raw["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in added.items()},
    }))  # fmt: skip
    slow = PromptTokenizer.load(tmp_path, 1000)
    text = PREFIX + "What happens at 12.5s?"
    assert slow.encode(text) == PromptTokenizer(make_tokenizer()).encode(text)
