from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest
from damage import damaged_json, outcome
from hypothesis import assume, given
from hypothesis import strategies as st

from xl2jax.errors import UserError
from xl2jax.prompt import IM_END, PREFIX, PromptTokenizer, suffix, time_text
from xl2jax.testing import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(make_tokenizer())


def test_prompt_text(tokenizer: PromptTokenizer) -> None:
    """Prefix and suffix together are the prompt of the released model."""
    part = suffix(tokenizer, "What happens?")
    whole = tokenizer.tokenizer.decode(tokenizer.encode(*PREFIX) + part.ids, skip_special_tokens=False)
    assert whole == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(part.ids[part.first : part.last]) == "What happens?"


# Qwen2's chat template, which Video-XL-2 was trained with.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("history", [[], [("Who?", "A cat.")]])
def test_the_prompt_is_qwens_chat_template(tokenizer: PromptTokenizer, history: list[tuple[str, str]]) -> None:
    """PREFIX, the video and the suffix are what transformers makes of the template."""
    pytest.importorskip("jinja2")
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=CHAT_TEMPLATE)
    contents = [text for turn in history for text in turn] + ["What happens?"]
    contents[0] = "<video>\n" + contents[0]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, _, after = text.partition("<video>")
    assert reference.encode(before, add_special_tokens=False) == tokenizer.encode(*PREFIX)
    assert reference.encode(after, add_special_tokens=False) == suffix(tokenizer, "What happens?", history).ids


def test_transformers_reads_the_same_tokenizer(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path), local_files_only=True)
    for text in ("What happens at 12.5s? 日本", "  two\n\nlines ", "naïve café"):
        assert reference.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    """`auto_map` asks transformers to import Python files of the checkpoint."""
    slow_files(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto_map))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert PromptTokenizer.load(tmp_path, 1000).encode(IM_END)
    assert not (tmp_path / "ran").exists()


def test_times(tokenizer: PromptTokenizer) -> None:
    assert [time_text(t) for t in (0.0, 12.0, 7.3)] == ["Time 0.0s:", "Time 12.0s:", "Time 7.3s:"]
    ids = tokenizer.time_ids([0.0, 0.2, 0.5, 0.8, 10.0, 11.0, 12.0, 13.0])
    assert [tokenizer.decode(i) for i in ids] == ["Time 0.0s:", "Time 10.0s:"]
    assert len(ids[1]) == len(ids[0]) + 1  # each digit is a token


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


CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*CONTROLS, "\n", "user\n", "assistant\n"]))).map(
    "".join
)


@given(texts, st.lists(st.tuples(texts, texts), max_size=2))
def test_control_tokens_in_text_are_text(
    tokenizer: PromptTokenizer, question: str, history: list[tuple[str, str]]
) -> None:
    """For any question, all control tokens come from the template, and decoding gives the question back."""
    assume(question.strip())
    part = suffix(tokenizer, question, history)
    controls = [tokenizer.tokenizer.id_to_token(i) for i in part.ids if tokenizer.tokenizer.id_to_token(i) in CONTROLS]
    assert controls == ["<|im_end|>", "<|im_start|>"] * (2 * len(history) + 1)
    assert question in tokenizer.decode(part.ids)


@given(st.text(max_size=40).filter(lambda t: "<|" not in t and t.strip()))
def test_ids_equal_upstreams_for_plain_text(tokenizer: PromptTokenizer, question: str) -> None:
    """Upstream tokenises the whole text after the video at once, including special tokens."""
    whole = f"\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert suffix(tokenizer, question).ids == tokenizer.tokenizer.encode(whole, add_special_tokens=False).ids


def test_a_pickled_tokenizer_treats_control_tokens_in_text_as_text(tokenizer: PromptTokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("a<|im_end|>b") == tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode(IM_END)[0] not in again.encode("a<|im_end|>b")


def test_messages_with_roles_are_turns(tokenizer: PromptTokenizer) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]
    assert suffix(tokenizer, "And then?", messages) == suffix(tokenizer, "And then?", [("Who?", "A cat.")])


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "message 1 is not"),
        ([{"role": "user", "content": "x"}], "has no answer"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "y"}], "message 1 is not"),
        ([("a", "b"), {"role": "user", "content": "x"}], "message 1 is not"),
        (["ab"], "neither a"),
        ([("a", None)], "neither a"),
    ],
)
def test_history_of_another_form_is_refused(tokenizer: PromptTokenizer, history: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        suffix(tokenizer, "And then?", history)


def test_questions_that_are_not_unicode_or_too_long(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(UserError, match="not UTF-8 at character 4"):
        suffix(tokenizer, "caf\u00e9\udce9")
    with pytest.raises(UserError, match="more than the 32,768"):
        suffix(tokenizer, "x " * 150_000)


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
    """A damaged tokenizer is refused with one line, or it encodes and decodes text."""
    whole = make_tokenizer().to_str().encode()
    for seed in range(100):
        (tmp_path / "tokenizer.json").write_bytes(damaged_json(whole, random.Random(seed)))
        tokenizer, _ = outcome(lambda: PromptTokenizer.load(tmp_path, 1000))
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("What happens at 12.5s? 日本"))


def slow_files(folder: Path) -> None:
    """Writes vocab.json and merges.txt without tokenizer.json, as in older checkpoints."""
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
    parts = (*PREFIX, "What happens at 12.5s?")
    assert slow.encode(*parts) == PromptTokenizer(make_tokenizer()).encode(*parts)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_slow_tokenizer_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    slow_files(tmp_path)
    if name != "special_tokens_map.json":  # transformers reads it only for settings that the others lack
        (tmp_path / name).write_bytes(b"[\xff")
        with pytest.raises(UserError, match="the tokenizer cannot be read|lacks the special token"):
            PromptTokenizer.load(tmp_path, 1000)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe or a device"):
        PromptTokenizer.load(tmp_path, 1000)
