"""The HTTP interface, as clients use it: OpenAI's own client, and the requests of others."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import make_service, metric, served, wait_for

import xl2jax
from xl2jax.serving.limits import Limits
from xl2jax.serving.media import MediaRules
from xl2jax.serving.service import Service
from xl2jax.testing import shape_frame, write_clip

LIMITS = Limits(
    queue=8, answers=3, fetch_seconds=5, frames=64, body_bytes=4 << 20, video_bytes=2 << 20, new_tokens=3000
)
FRAMES = {"xl2jax": {"fps": 2, "max_frames": 40}}
SAMPLING = xl2jax.FrameSampling(fps=2, max_frames=40)
QUESTION = "Which shape is red?"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """A folder that may be read, with two videos, a link that leads out of it, and a text file."""
    root = tmp_path_factory.mktemp("media")
    (root / "a.mp4").write_bytes(clip.read_bytes())
    write_clip(root / "b.mp4", 6, fps=8, width=64, height=64)
    outside = tmp_path_factory.mktemp("outside") / "secret.mp4"
    outside.write_bytes(clip.read_bytes())
    (root / "link.mp4").symlink_to(outside)
    (root / "text.mp4").write_text("This is no video.")
    return root


@pytest.fixture(scope="module")
def service(model: xl2jax.Model, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make_service(model, tmp_path_factory.mktemp("serving"), limits=LIMITS, rules=MediaRules((media,)))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def local(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": path.as_uri()}}


def asks(*parts: Any, question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def answer_alone(model: xl2jax.Model, video: Path, question: str = QUESTION, **options: Any) -> str:
    with model.watch(video, SAMPLING) as watched:
        return model.ask(watched, question, **({"max_new_tokens": 12} | options)).text


def test_an_answer_is_that_of_the_library(
    client: openai.OpenAI, model: xl2jax.Model, media: Path, service: Service
) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": asks(local(media / "a.mp4")), "max_tokens": 12}
    first = client.chat.completions.create(**request, extra_body=FRAMES)
    again = client.chat.completions.create(**request, extra_body=FRAMES)
    with model.watch(media / "a.mp4", SAMPLING) as video:
        expected = model.ask(video, QUESTION, max_new_tokens=12)
        video_tokens = video.kv.layout.tokens - video.kv.layout.prefix
    assert first.choices[0].message.content == again.choices[0].message.content == expected.text
    assert first.choices[0].finish_reason == expected.finish_reason
    assert first.usage is not None
    assert again.usage is not None
    assert first.usage.completion_tokens == expected.new_tokens
    assert first.usage.model_extra == {"frames": 40, "video_tokens": video_tokens, "video_cached": False}
    assert again.usage.model_extra == {"frames": 40, "video_tokens": video_tokens, "video_cached": True}
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == video_tokens
    assert first.usage.prompt_tokens > video_tokens + expected.suffix_tokens
    assert metric(service, "xl2jax_generated_tokens_total") >= 2 * expected.new_tokens
    assert metric(service, "xl2jax_watched_videos", place="device") >= 1


def test_a_stream_says_the_same(client: openai.OpenAI, model: xl2jax.Model, media: Path) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=asks(local(media / "a.mp4")),
        max_completion_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"xl2jax": {**FRAMES["xl2jax"], "chunks": True}},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == answer_alone(model, media / "a.mp4", max_new_tokens=60)
    assert chunks[0].choices[0].delta.role == "assistant"
    *_, last, usage = chunks
    assert last.choices[0].finish_reason in ("stop", "length")
    assert (usage.choices, usage.usage is not None) == ([], True)
    shown = (last.model_extra or {})["xl2jax"]["chunks"]
    assert [c["number"] for c in shown] == [1, 2, 3]
    assert {"start", "end", "score", "dense"} <= set(shown[0])
    assert len({c.id for c in chunks}) == 1


@pytest.mark.slow
def test_many_at_once_get_their_own_answers(address: str, model: xl2jax.Model, media: Path, service: Service) -> None:
    """Eight questions about two videos, one of them new: each answer is that of the question asked alone."""
    write_clip(media / "new.mp4", 8, fps=10, width=64, height=64)
    cases = [(media / name, f"{QUESTION} {n}") for n in range(4) for name in ("a.mp4", "new.mp4")]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        client.chat.completions.create(
            model="tiny", messages=asks(local(media / "a.mp4")), max_tokens=1, extra_body=FRAMES
        )
    before = metric(service, "xl2jax_watched_frames_total")

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            async def ask(video: Path, question: str) -> str:
                answer = await client.chat.completions.create(
                    model="tiny", messages=asks(local(video), question=question), max_tokens=12, extra_body=FRAMES
                )
                return answer.choices[0].message.content or ""

            return await asyncio.gather(*(ask(*case) for case in cases))

    answers = asyncio.run(ask_all())
    with model.watch(media / "new.mp4", SAMPLING) as new, model.watch(media / "a.mp4", SAMPLING) as known:
        expected = [
            model.ask(new if video.name == "new.mp4" else known, q, max_new_tokens=12).text for video, q in cases
        ]
        frames = len(new.times)
    assert answers == expected
    # The new video was watched once for all four.
    assert metric(service, "xl2jax_watched_frames_total") - before == frames


def test_earlier_turns_are_history(client: openai.OpenAI, model: xl2jax.Model, media: Path) -> None:
    first, *_ = asks(local(media / "a.mp4"), question="What is it?")
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            first,
            {"role": "assistant", "content": "A circle."},
            {"role": "user", "content": "And then?"},
        ],
        max_tokens=12,
        extra_body=FRAMES,
    )
    expected = answer_alone(model, media / "a.mp4", "And then?", history=[("What is it?", "A circle.")])
    assert answer.choices[0].message.content == expected


def test_sampling_follows_the_seed(client: openai.OpenAI, model: xl2jax.Model, media: Path) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=asks(local(media / "a.mp4")),
        max_tokens=12,
        temperature=0.9,
        top_p=0.8,
        seed=5,
        extra_body=FRAMES,
    )
    sampling = xl2jax.TokenSampling(0.9, 0.8)
    assert answer.choices[0].message.content == answer_alone(model, media / "a.mp4", sampling=sampling, seed=5)


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, model: xl2jax.Model, media: Path) -> None:
    whole = answer_alone(model, media / "a.mp4", max_new_tokens=40)
    stop = whole[len(whole) // 2 :][:3]
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=asks(local(media / "a.mp4")),
            max_tokens=40,
            stop=[stop, "never said"],
            stream=stream,
            extra_body=FRAMES,
        )
        if stream:
            chunks = list(answer)
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_the_requests_of_lmms_eval(client: openai.OpenAI, model: xl2jax.Model, media: Path) -> None:
    """Its model `openai` sends file addresses, text behind them, and the number of frames as vLLM reads it."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": f"file://{media / 'a.mp4'}"}},  # type: ignore[list-item]
                    {"type": "text", "text": QUESTION},
                ],
            }
        ],
        max_tokens=12,
        temperature=0,
        extra_body={
            "media_io_kwargs": {"video": {"num_frames": 16, "fps": -1}},
            "mm_processor_kwargs": {"do_sample_frames": False},
        },
    )
    with model.watch(media / "a.mp4", xl2jax.FrameSampling(None, max_frames=16)) as video:
        assert answer.choices[0].message.content == model.ask(video, QUESTION, max_new_tokens=12).text
    assert answer.usage is not None
    assert (answer.usage.model_extra or {})["frames"] == 16


def test_the_requests_of_litellm(address: str, client: openai.OpenAI, model: xl2jax.Model, media: Path) -> None:
    """What its provider `openai` sends for `completion(..., extra_body={"xl2jax": ...})`, with a file address or an id."""
    stored = client.files.create(file=media / "a.mp4", purpose="user_data")
    expected = answer_alone(model, media / "a.mp4")
    parts: list[dict[str, Any]] = [local(media / "a.mp4"), {"type": "file", "file": {"file_id": stored.id}}]
    for part in parts:
        sent = {"model": "tiny", "messages": asks(part), "temperature": 0, "max_tokens": 12, **FRAMES}
        answer = httpx2.post(f"{address}/v1/chat/completions", json=sent, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == expected
    client.files.delete(stored.id)


OFFLINE = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
LITELLM = """
import json, sys
import litellm

asked = json.load(sys.stdin)
answer = litellm.completion(**asked)
pieces = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
print(json.dumps({
    "text": answer.choices[0].message.content,
    "reason": answer.choices[0].finish_reason,
    "usage": answer.usage.completion_tokens,
    "stream": "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices),
    "stream_usage": [piece.usage.completion_tokens for piece in pieces if getattr(piece, "usage", None)],
}))
"""


@pytest.mark.slow
def test_litellm(address: str, model: xl2jax.Model, media: Path) -> None:
    """LiteLLM itself, plain and streaming, in a process of its own: it takes seconds to import, and leaves threads."""
    sent = {
        "model": "openai/tiny",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "messages": asks(local(media / "a.mp4")),
        "temperature": 0,
        "max_tokens": 12,
        "extra_body": FRAMES,
    }
    run = subprocess.run(
        [sys.executable, "-c", LITELLM],
        input=json.dumps(sent), env=OFFLINE, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    with model.watch(media / "a.mp4", SAMPLING) as video:
        expected = model.ask(video, QUESTION, max_new_tokens=12)
    assert (said["text"], said["reason"]) == (expected.text, expected.finish_reason)
    assert said["stream"] == expected.text
    assert said["usage"] == expected.new_tokens
    assert said["stream_usage"] == [expected.new_tokens]


@pytest.mark.slow
def test_the_examples_of_the_documentation(address: str, media: Path, tmp_path: Path) -> None:
    """They run as they are written, but for the address, the model's name and the video."""
    text = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    for old, new in {
        "http://127.0.0.1:8000": address,
        "/srv/videos/talk.mp4": str(media / "b.mp4"),
        """'"$PWD"'/build/demo.mp4""": str(media / "b.mp4"),
        '"talk.mp4"': repr(str(media / "b.mp4")),
        "video-xl-2": "tiny",
        '"max_frames": 512': '"max_frames": 64',  # the ceiling of this server
    }.items():
        text = text.replace(old, new)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    python, litellm = (block for kind, block in blocks if kind == "python")
    curls = [block for kind, block in blocks if not kind and block.startswith("curl ")]
    run = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("CompletionUsage") == 2
    run = subprocess.run(
        [sys.executable, "-c", litellm], env=OFFLINE, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    plain = run.stdout[: len(run.stdout) // 2]
    assert plain
    assert run.stdout == f"{plain}\n{plain}"  # the same as a stream
    assert len(curls) == 3
    for block in curls:
        run = subprocess.run(
            ["bash", "-euc", block], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr
        assert "error" not in run.stdout
    for file in httpx2.get(f"{address}/v1/files").json()["data"]:
        httpx2.delete(f"{address}/v1/files/{file['id']}")
    assert (
        "data: [DONE]" in subprocess.run(["bash", "-euc", curls[1]], capture_output=True, text=True, check=True).stdout
    )


NOBODY = "0" * 32
PATHS = st.sampled_from(
    [
        *("", "/chat/completions", "/models", "/models/tiny", "/files", "/files/file-0", "/uploads"),
        f"/files/file-{NOBODY}/content",
        *(f"/uploads/upload_{NOBODY}/{last}" for last in ("parts", "complete", "cancel")),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
VALID: list[dict[str, Any]] = [
    {"messages": asks({"type": "video_url", "video_url": {"url": "file:///nowhere.mp4"}}), "max_tokens": 4},
    {"bytes": 10, "filename": "v.mp4", "purpose": "user_data", "mime_type": "video/mp4"},
    {"part_ids": ["part_" + "0" * 32], "md5": None},
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]), PATHS, st.sampled_from(VALID),
    st.dictionaries(st.text(max_size=5) | st.sampled_from([k for body in VALID for k in body]), VALUES, max_size=3),
    st.sampled_from(["application/json", "multipart/form-data", "multipart/form-data; boundary=x", "text/plain"]),
    st.none() | st.binary(max_size=40),
)  # fmt: skip
def test_no_request_is_a_fault(
    address: str, method: str, path: str, valid: dict[str, Any], changes: dict[str, Any], kind: str, raw: bytes | None
) -> None:
    """Any method, address and body has an answer, and none with status 500 or above. Refusals are OpenAI's errors."""
    content = json.dumps(valid | changes).encode() if raw is None else raw
    answer = httpx2.request(method, f"{address}/v1{path}", content=content, headers={"Content-Type": kind}, timeout=30)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        assert answer.json()["error"]["message"]


# --- where videos come from --------------------------------------------------------------------


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_one_video_by_many_ways_is_watched_once(
    client: openai.OpenAI, model: xl2jax.Model, media: Path, service: Service
) -> None:
    data = (media / "b.mp4").read_bytes()
    stored = client.files.create(file=("b.mp4", data), purpose="user_data")
    assert stored.bytes == len(data)
    parts: list[dict[str, Any]] = [
        {"type": "file", "file": {"file_id": stored.id}, "uuid": "the video"},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{coded(data)}"}},
        {"type": "file", "file": {"file_data": coded(data), "filename": "b.mp4"}},
        local(media / "b.mp4"),
        {"type": "video_url", "video_url": None, "uuid": "the video"},
    ]
    expected, before = answer_alone(model, media / "b.mp4"), metric(service, "xl2jax_watched_frames_total")
    for number, part in enumerate(parts):
        answer = client.chat.completions.create(model="tiny", messages=asks(part), max_tokens=12, extra_body=FRAMES)
        assert answer.choices[0].message.content == expected
        assert answer.usage is not None
        assert (answer.usage.model_extra or {})["video_cached"] == (number > 0)
    assert metric(service, "xl2jax_watched_frames_total") - before == (answer.usage.model_extra or {})["frames"]
    assert [f.id for f in client.files.list()] == [stored.id]
    assert client.files.content(stored.id).read() == data
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(stored.id)
    wait_for(lambda: not list((media.parent).glob("*/spool/*")))  # nothing of a request is left


def test_settings_that_choose_the_same_frames_share_a_watching(
    client: openai.OpenAI, model: xl2jax.Model, media: Path, service: Service
) -> None:
    """Six seconds have twelve frames at two a second, whatever more is allowed."""

    def ask(**settings: Any) -> tuple[str | None, int, bool]:
        answer = client.chat.completions.create(
            model="tiny", messages=asks(local(media / "b.mp4")), max_tokens=12, extra_body={"xl2jax": settings}
        )
        assert answer.usage is not None
        usage = answer.usage.model_extra or {}
        return answer.choices[0].message.content, usage["frames"], usage["video_cached"]

    text, frames, _ = ask(fps=2, max_frames=20)
    before = metric(service, "xl2jax_watched_frames_total")
    for _ in range(2):
        assert ask(fps=2, max_frames=22) == (text, frames, True)
    assert metric(service, "xl2jax_watched_frames_total") == before
    others, _, cached = ask(fps="uniform", max_frames=frames)  # as many, but spread to the end
    assert not cached
    with model.watch(media / "b.mp4", xl2jax.FrameSampling(None, max_frames=frames)) as video:
        assert others == model.ask(video, QUESTION, max_new_tokens=12).text


def test_frames_are_a_video(client: openai.OpenAI, model: xl2jax.Model, tmp_path: Path) -> None:
    pictures = []
    for i in range(8):
        buffer = io.BytesIO()
        Image.fromarray(shape_frame(float(i), 64, 48)).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
        (tmp_path / f"{i}.jpg").write_bytes(pictures[-1])
    with model.watch(tmp_path, xl2jax.FrameSampling(1.0, None)) as video:
        expected = model.ask(video, QUESTION, max_new_tokens=12).text
        assert len(video.times) == 8
    one = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(map(coded, pictures))}}
    many = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{coded(p)}"}} for p in pictures]
    for parts in ([one], many):
        answer = client.chat.completions.create(model="tiny", messages=asks(*parts), max_tokens=12)
        assert answer.choices[0].message.content == expected
        assert answer.usage is not None
        assert (answer.usage.model_extra or {})["frames"] == 8


def test_images_may_be_pictures(client: openai.OpenAI, model: xl2jax.Model) -> None:
    """They are seen in tiles, with the text that stands between them, and kept as a video is."""
    pictures, parts = [], []
    for i, size in enumerate(((140, 70), (64, 48))):
        buffer = io.BytesIO()
        pictures.append(Image.fromarray(shape_frame(float(i), *size)))
        pictures[-1].save(buffer, "PNG")
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(buffer.getvalue())}"}})
    between = [parts[0], {"type": "text", "text": "and"}, parts[1]]
    for content, text in ((parts, None), (between, "<image>\nand\n<image>\n")):
        with model.see(pictures, text) as seen:
            expected = model.ask(seen, QUESTION, max_new_tokens=12).text
        for cached in (False, True):
            answer = client.chat.completions.create(
                model="tiny",
                messages=asks(*content),
                max_tokens=12,
                extra_body={"xl2jax": {"treat_images_as": "pictures"}},
            )
            assert answer.choices[0].message.content == expected
            assert answer.usage is not None
            usage = answer.usage.model_extra or {}
            assert (usage["frames"], usage["video_tokens"]) == (0, 3 * model.config.tile_tokens)
            assert usage["video_cached"] == cached


# --- refusals ----------------------------------------------------------------------------------

VIDEO = {"type": "video_url", "video_url": {"url": "file:///nowhere.mp4"}}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": asks()}, 400, "no video"),
        ({"messages": asks(VIDEO, question=" ")}, 400, "the question is empty"),
        ({"messages": asks(VIDEO, {"type": "file", "file": {"file_id": "file-1"}})}, 400, "several videos"),
        ({"messages": asks({"type": "input_audio"})}, 400, "input_audio"),
        ({"messages": asks({"type": "file", "file": {"file_id": "file-../../x"}})}, 404, "no file of this id"),
        ({"messages": asks({"type": "video_url", "video_url": None, "uuid": "unknown"})}, 404, "uuid"),
        ({"messages": [*asks(VIDEO), {"role": "assistant", "content": "."}]}, 400, "begin and end"),
        ({"messages": asks(VIDEO, question="x" * 70_000)}, 400, "70,000 characters"),
        ({"model": "gpt"}, 404, "there is no such model here"),
        ({"n": 2}, 400, "n: is not supported"),
        ({"tools": [{}]}, 400, "tools: is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "max_tokens: should be at most 3000"),
        ({"xl2jax": {"max_frames": 65}}, 400, "max_frames: should be from 4 to 64"),
        ({"xl2jax": {"frames": 8}}, 400, "xl2jax.frames"),
        ({"xl2jax": {"fps": 0}}, 400, "fps must be above 0"),
        ({"media_io_kwargs": {"video": {"num_frames": 10_000}}}, 400, "num_frames: should be from 4 to 64"),
        ({"media_io_kwargs": {"video": {"fps": 1e9}}}, 400, "fps"),
        ({"stop": [""]}, 400, "stop"),
        ({"seed": "x"}, 400, "seed"),
    ],
)
def test_a_wrong_request_is_one_clear_error(address: str, change: dict[str, Any], status: int, words: str) -> None:
    response = httpx2.post(f"{address}/v1/chat/completions", json={"messages": asks(VIDEO)} | change)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": NaN}', b'{"messages": 1e999}']
)
def test_a_body_that_is_no_request(address: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx2.post(f"{address}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["link.mp4", "../outside0/secret.mp4", "missing.mp4", "text.mp4", "."])
@pytest.mark.parametrize("stream", [False, True])
def test_no_path_in_errors(address: str, media: Path, name: str, stream: bool) -> None:
    part = {"type": "video_url", "video_url": {"url": f"file://{media}/{name}"}}
    response = httpx2.post(f"{address}/v1/chat/completions", json={"messages": asks(part), "stream": stream})
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "/" not in message.replace("http(s)", "")
    assert socket.gethostname() not in message
    if name != "text.mp4":
        assert "no such file" in message or "regular file" in message


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/v.mp4",
        "https://127.0.0.1/v.mp4",
        "ftp://x/v.mp4",
        "data:video/mp4,plain",
        "data:;base64,?",
        "v.mp4",
    ],
)
def test_other_addresses_are_refused(address: str, url: str) -> None:
    part = {"type": "video_url", "video_url": {"url": url}}
    response = httpx2.post(f"{address}/v1/chat/completions", json={"messages": asks(part)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "media_refused")


def test_ceilings_on_bytes(address: str, client: openai.OpenAI) -> None:
    data = np.zeros(3 << 20, np.uint8).tobytes()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{coded(data)}"}}
    response = httpx2.post(f"{address}/v1/chat/completions", json={"messages": asks(part)})
    assert response.status_code in (400, 413)
    with pytest.raises(openai.APIStatusError) as e:
        client.files.create(file=("big.mp4", data), purpose="user_data")
    assert e.value.status_code == 413
    assert list(client.files.list()) == []


def test_uploads_have_a_limit_together(service: Service, address: str, client: openai.OpenAI) -> None:
    data = bytes(1_900_000)
    kept = [client.files.create(file=("v.mp4", data), purpose="user_data") for _ in range(2)]
    with pytest.raises(openai.APIStatusError) as e:
        client.files.create(file=("v.mp4", data), purpose="user_data")
    assert (e.value.status_code, e.value.code) == (507, "no_space")
    for file in kept:
        client.files.delete(file.id)
    assert list(service.uploads._folder.iterdir()) == []


@pytest.mark.slow
def test_a_body_that_does_not_come(address: str) -> None:
    """A client that says nothing more keeps no place in the queue for ever."""
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(100)


def test_pages_of_other_sites_are_refused(address: str) -> None:
    assert httpx2.get(f"{address}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert httpx2.get(f"{address}/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx2.get(f"{address}/v1/models", headers={"Origin": address}).status_code == 200
    text = httpx2.post(f"{address}/v1/chat/completions", content="{}", headers={"Content-Type": "text/plain"})
    assert text.status_code == 415


def test_the_small_addresses(address: str, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{address}/ready").json() == {"status": "ready"}
    assert "xl2jax_generated_tokens_total" in httpx2.get(f"{address}/metrics").text
    missing = httpx2.get(f"{address}/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx2.get(f"{address}/v1/chat/completions").status_code == 405


@pytest.mark.slow
def test_warming_up_comes_before_ready(model: xl2jax.Model, tmp_path: Path) -> None:
    """It does what the first questions do, for each number of answers."""
    service = make_service(model, tmp_path, limits=Limits(answers=2), warm_up_frames=16, keep=False)
    with served(service) as address:
        first = httpx2.get(f"{address}/ready").status_code
        wait_for(lambda: httpx2.get(f"{address}/ready").status_code == 200, 200)
        assert first == 503


def test_a_server_that_cannot_warm_up_serves(model: xl2jax.Model, tmp_path: Path) -> None:
    def no_memory() -> Iterator[None]:
        yield
        raise xl2jax.UserError("no memory")

    failing = make_service(model, tmp_path, keep=False)
    failing.engine._warm_up, failing.engine._warm = no_memory, False
    with served(failing) as address:
        wait_for(lambda: httpx2.get(f"{address}/ready").status_code == 200, 20)


# --- load --------------------------------------------------------------------------------------


def begin_stream(address: str, media: Path) -> Any:
    body = {"messages": asks(local(media / "a.mp4")), "max_tokens": 3000, "stream": True, **FRAMES}
    return httpx2.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60)


def test_an_answer_stops_when_its_client_goes(address: str, media: Path, service: Service) -> None:
    before = metric(service, "xl2jax_questions_cancelled_total")
    with begin_stream(address, media) as response:
        assert next(line for line in response.iter_lines() if '"content":"' in line)
    wait_for(lambda: metric(service, "xl2jax_questions_cancelled_total") == before + 1, 20)
    wait_for(lambda: metric(service, "xl2jax_answers_running") == 0, 20)
    wait_for(lambda: service.in_flight == 0, 20)


def test_too_many_requests_are_told_when_to_come_back(address: str, media: Path, service: Service) -> None:
    service.in_flight += LIMITS.queue  # as many as that many clients would add
    try:
        response = httpx2.post(f"{address}/v1/chat/completions", json={"messages": asks(local(media / "a.mp4"))})
    finally:
        service.in_flight -= LIMITS.queue
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert httpx2.get(f"{address}/health").status_code == 200


def test_key_and_time_limit(model: xl2jax.Model, media: Path, tmp_path: Path) -> None:
    limits = Limits(request_seconds=0.3, new_tokens=100_000)
    with served(make_service(model, tmp_path, limits=limits, rules=MediaRules((media,)), api_key="k3y")) as address:
        assert httpx2.get(f"{address}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "k3y"}):
            refused = httpx2.get(f"{address}/metrics", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        body = {"messages": asks(local(media / "a.mp4")), "max_tokens": 50_000, **FRAMES}
        late = httpx2.post(
            f"{address}/v1/chat/completions", json=body, headers={"Authorization": "Bearer k3y"}, timeout=60
        )
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        late_in_stream = httpx2.post(
            f"{address}/v1/chat/completions",
            json=body | {"stream": True},
            headers={"Authorization": "Bearer k3y"},
            timeout=60,
        )
        if late_in_stream.status_code == 200:  # it had begun
            assert json.loads(late_in_stream.text.split("data: ")[-1])["error"]["code"] == "timeout"
        else:
            assert late_in_stream.status_code == 504
