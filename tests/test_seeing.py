"""Pictures in prompts: what the Python API makes of them, against upstream's ids and answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import xl2jax
from xl2jax.errors import UserError
from xl2jax.evaluation.case import greedy_reply
from xl2jax.inference import prefill, session
from xl2jax.inference.store import load_cache, pictures_key, save_cache
from xl2jax.prompt import suffix
from xl2jax.video.clip import pictures_as_frames
from xl2jax.video.pictures import Picture


def byte_tokenizer(specials: dict[str, int]) -> Tokenizer:
    """The tokenizer of the case: UTF-8 bytes are the ids 0 to 255, and the control tokens follow."""
    letters = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in letters]
    alphabet = {chr(b): b for b in letters} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in sorted(specials, key=specials.__getitem__)])
    return tokenizer


@pytest.fixture(scope="module")
def case(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "images_tiny" / "case.json").read_text())


@pytest.fixture(scope="module")
def seer(goldens: Path, case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> xl2jax.Model:
    """The model of the case."""
    folder = tmp_path_factory.mktemp("case") / "checkpoint"
    shutil.copytree(goldens / "images_tiny" / "checkpoint", folder)
    byte_tokenizer(case["tokenizer"]["specials"]).save(str(folder / "tokenizer.json"))
    return xl2jax.load(folder)


@pytest.fixture
def files(goldens: Path) -> dict[str, Path]:
    return {p.stem: p for p in (goldens / "images_tiny" / "pictures").glob("*.png")}


def split(text: str) -> tuple[str, str]:
    """A prompt with its places, as `see` and `ask` take it."""
    end = text.rindex("<image>") + len("<image>")
    return text[:end], text[end:]


def reply(seer: xl2jax.Model, seen: xl2jax.WatchedVideo, question: str, count: int) -> list[int]:
    """The ids of a greedy answer that nothing stops."""
    ids = suffix(seer.tokenizer, question, None, seen.lead).ids
    return greedy_reply(seer.network, seen.kv.cache, ids, count).ids.tolist()


def prompt_of(
    name: str, seer: xl2jax.Model, case: dict[str, Any], files: dict[str, Path]
) -> tuple[list[Picture], str, str, list[int]]:
    """The pictures of a prompt, the text before the question, the question, and upstream's ids with -200 for pictures."""
    prompt = next(p for p in case["prompts"] if p["name"] == name)
    counts = iter(case["pictures"][p]["visual_tokens"] for p in prompt["pictures"])
    expected: list[int] = []
    for token in prompt["input_ids"]:
        expected += [-200] * next(counts) if token == -200 else [token]
    assert len(expected) == prompt["length"]
    return [Picture.read(files[p]) for p in prompt["pictures"]], *split(prompt["text"]), expected


NAMES = ("square", "tall", "two", "mixed")


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_upstreams(name: str, seer: xl2jax.Model, case: dict[str, Any], files: dict[str, Path]) -> None:
    pictures, text, question, expected = prompt_of(name, seer, case, files)
    around = seer.around(pictures, text)
    ids = np.where(around.before.visual >= 0, -200, around.before.ids).tolist()
    assert ids + suffix(seer.tokenizer, question, None, around.lead).ids == expected
    assert np.array_equal(around.before.visual[around.before.visual >= 0], np.arange(ids.count(-200)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_upstreams(name: str, seer: xl2jax.Model, case: dict[str, Any], files: dict[str, Path]) -> None:
    pictures, text, question, expected = prompt_of(name, seer, case, files)
    with seer.see(pictures, text) as seen:
        assert reply(seer, seen, question, case["new_tokens"]) == generated(name, files)
        answer = seer.ask(seen, question, max_new_tokens=4)
    assert answer.chunks == []
    assert answer.context_tokens + answer.suffix_tokens == len(expected)


def generated(name: str, files: dict[str, Path]) -> list[int]:
    folder = files["square"].parent.parent
    ids: list[int] = load_file(folder / "expected" / "dense.safetensors")[f"{name}_generated"].tolist()
    return ids


def test_pictures_come_first_by_default(seer: xl2jax.Model, files: dict[str, Path]) -> None:
    """As in upstream's evaluation: separated by a space, and a newline before the question."""
    pictures = [Picture.read(files[name]) for name in ("wide", "small")]
    for around in (seer.around(pictures), seer.around(pictures, "<image> <image>\n")):
        assert around.lead == "\n"
        text = bytes(np.where(around.before.visual >= 0, 42, around.before.ids)[-18:].astype(np.uint8))
        assert text == b"\n" + b"*" * 12 + b" " + b"*" * 4


@pytest.mark.slow
def test_a_picture_beside_a_video(
    seer: xl2jax.Model, case: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    """The prompt equals upstream's, and pooled chunks leave the picture whole."""
    for number in range(16):
        Image.fromarray(np.full((70, 70, 3), 15 * number, np.uint8)).save(tmp_path / f"{number}.png")
    config = xl2jax.PrefillConfig(1, 1)
    sampling = xl2jax.FrameSampling(max_fps=1)
    with seer.see([files["small"]], "<video>\nIs <image>", video=tmp_path, sampling=sampling, config=config) as seen:
        layout = seen.kv.layout
        assert (layout.groups, layout.tail) == (4, len("\nIs ") + 4)
        assert seen.visual_tokens == 4 * 4 + 4
        dense = seer.ask(seen, " in it?", bilevel=None, max_new_tokens=4)
        assert dense.context_tokens == layout.tokens
        sparse = xl2jax.BilevelConfig(1, 4, 0)
        pooled = seer.ask(seen, " in it?", bilevel=sparse, max_new_tokens=4)
        assert pooled.context_tokens == layout.tokens - 2 * 3
        assert [c.dense for c in pooled.chunks] == [True, False, False, True]
        # The tail keeps its keys: with all blocks dense, the mixed cache is the dense one in natural order.
        chosen = session.context_of_units(seer.network, seen.kv, [], sparse)
        ids = suffix(seer.tokenizer, " in it?", None, seen.lead).ids
        mixed, whole = (greedy_reply(seer.network, c, ids, 4) for c in (chosen.context, seen.kv.cache))
        assert np.linalg.norm(mixed.hidden - whole.hidden) < 1e-5 * np.linalg.norm(whole.hidden)
    with pytest.raises(UserError, match="where the video stands"):
        seer.see([files["small"]], "<image>", video=tmp_path)


def test_text_alone_is_tokenised_as_one_piece(seer: xl2jax.Model) -> None:
    around = seer.around([])
    ids = [*around.before.ids.tolist(), *suffix(seer.tokenizer, "How are you?", None, around.lead).ids]
    plain = bytes(i for i in ids if i < 256)
    assert plain == b"system\nYou are a helpful assistant.\nuser\nHow are you?\nassistant\n"
    assert b"user\nHow are you?" in bytes(i for i in ids[len(around.before.ids) :] if i < 256)  # tokenised together


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


TEXT = "Left: <image> Right: <image>"


def test_pictures_are_asked_as_videos_are(model: xl2jax.Model, tmp_path: Path) -> None:
    """Streamed, in a conversation, and from a file, which other text or damage does not pass."""
    seen = model.see([noise(140, 70), Image.fromarray(noise(40, 30))], TEXT)
    pieces: list[str] = []
    alone = model.ask(seen, " What is it?", max_new_tokens=4, on_text=pieces.append)
    assert alone.text == "".join(pieces)
    assert model.ask(seen, "Why?", history=[("What?", "Red.")], max_new_tokens=4).new_tokens > 0
    assert model.ask(seen, "", max_new_tokens=4).new_tokens > 0  # the text before the pictures may be the question
    key = pictures_key([], TEXT, xl2jax.PrefillConfig())
    file = tmp_path / "pictures.kv"
    save_cache(file, seen, key)
    again = load_cache(file, model, key, Path("a.png"), xl2jax.BilevelConfig())
    assert (again.lead, again.picture_tokens, again.times) == (seen.lead, seen.picture_tokens, [])
    assert model.ask(again, " What is it?", max_new_tokens=4).text == alone.text
    for wrong in ({"text": None}, {"pictures": "others"}, {"video": "a hash"}):
        with pytest.raises(UserError, match="made from"):
            load_cache(file, model, key | wrong, Path("a.png"), xl2jax.BilevelConfig())


@pytest.mark.slow
def test_text_around_a_video_is_kept_in_its_file(model: xl2jax.Model, clip: Path, tmp_path: Path) -> None:
    """Without pictures too: the prompt before the video, and what leads to the question."""
    key = {"prefill": dataclasses.asdict(xl2jax.PrefillConfig())}
    with model.see([], "Look at <video> and say: ", video=clip) as seen:
        save_cache(tmp_path / "video.kv", seen, key)
        alone = model.ask(seen, "What?", max_new_tokens=4)
        layout, lead = seen.kv.layout, seen.lead
    assert lead == " and say: "
    with load_cache(tmp_path / "video.kv", model, key, clip, xl2jax.BilevelConfig()) as again:
        assert (again.kv.layout, again.lead) == (layout, lead)
        assert model.ask(again, "What?", max_new_tokens=4).text == alone.text


@pytest.mark.slow
def test_pictures_together_and_in_8_bits(seer: xl2jax.Model, files: dict[str, Path]) -> None:
    square, small = (seer.see([files[name]]) for name in ("square", "small"))
    alone = [seer.ask(seen, "What is it?", max_new_tokens=12) for seen in (square, small)]
    together = seer.ask_many([(square, "What is it?"), (small, "What is it?")], max_new_tokens=12)
    assert [a.text for a in together] == [a.text for a in alone]
    quantized = seer.see([files["square"]], cache=xl2jax.CacheConfig("int8"))
    assert quantized.device_bytes < square.device_bytes
    seer.ask(quantized, "What is it?", max_new_tokens=2)
    with seer.see([]) as nothing:
        assert seer.ask(nothing, "How are you?", max_new_tokens=3).new_tokens > 0


@pytest.mark.slow
def test_a_long_prompt_goes_in_blocks(
    seer: xl2jax.Model, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = seer.see([files["square"], files["tall"]])
    monkeypatch.setattr(prefill, "global_tokens_at_once", lambda platform: 32)
    parts = seer.see([files["square"], files["tall"]])
    length = whole.kv.layout.tokens
    assert length > 64
    for a, b in ((whole.kv.cache.k, parts.kv.cache.k), (whole.kv.cache.v, parts.kv.cache.v)):
        a, b = (np.asarray(jnp.asarray(x))[:, :, :length] for x in (a, b))
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)


@pytest.mark.slow
def test_pictures_as_upstreams_benchmarks_show_them(
    seer: xl2jax.Model, case: dict[str, Any], files: dict[str, Path]
) -> None:
    prompt = next(p for p in case["prompts"] if p["name"] == "as_frames")
    clip = pictures_as_frames([files[name] for name in prompt["pictures"]])
    assert clip.times[::4] == prompt["times"]
    seen = seer.watch(clip, config=xl2jax.PrefillConfig(window_chunks=None))
    question = prompt["text"].removeprefix("<image>\n")
    assert reply(seer, seen, question, case["new_tokens"]) == generated("as_frames", files)


@pytest.mark.parametrize(
    ("pictures", "text", "words"),
    [
        (1, "no place", "0 times for 1 pictures"),
        (1, "<image><image>", "2 times"),
        (1, "<video> <image>", "there is no video"),
        (0, "\ud800", "not UTF-8"),
    ],
)
def test_wrong_places_are_refused(
    pictures: int, text: str, words: str, seer: xl2jax.Model, files: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=words):
        seer.see([files["small"]] * pictures, text)
