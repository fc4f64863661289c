"""Live videos of the server: frames over real WebSockets and from addresses, and questions meanwhile."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.server
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from serving import make_service, metric, served, wait_for
from test_live_source import mpeg_ts
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import xl2jax
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.serving import live, live_http
from xl2jax.serving.addresses import Downloads, is_public
from xl2jax.serving.limits import Limits, LiveLimits
from xl2jax.serving.live import LiveSession
from xl2jax.serving.live_http import BAD_MESSAGE, ENDED, REPLACED
from xl2jax.serving.media import MediaRules
from xl2jax.serving.service import Service
from xl2jax.testing import shape_frame

LIVE = LiveLimits(sessions=3, minutes=0.5, dense_minutes=0.1, host_gib=0.1, frame_bytes=100_000)
LIMITS = Limits(queue=8, answers=3, frames=64, live=LIVE)
QUESTION = "Which shape is red?"


def make(model: xl2jax.Model, folder: Path, **options: Any) -> Service:
    downloads = Downloads(("localhost", "127.0.0.1"), 1 << 20, 5, is_allowed=lambda _: True)
    return make_service(model, folder, **{"limits": LIMITS, "rules": MediaRules((folder,), downloads)} | options)


@pytest.fixture(autouse=True)
def quick_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_http, "_TELL_SECONDS", 0.1)


@pytest.fixture(scope="module")
def service(model: xl2jax.Model, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make(model, tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address


@pytest.fixture
def begin(address: str) -> Iterator[Callable[..., Any]]:
    """Opens a session with settings: its description. All are ended after the test."""

    def begin(**settings: Any) -> Any:
        response = httpx2.post(f"{address}/v1/live", json={"fps": 2, **settings}, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    yield begin
    for about in httpx2.get(f"{address}/v1/live").json()["data"]:
        httpx2.delete(f"{address}/v1/live/{about['id']}")


def picture(number: int) -> np.ndarray:
    return shape_frame(number / 2, 96, 64)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def feeding(address: str, about: Any, **options: Any) -> Iterator[ClientConnection]:
    with connect(address.replace("http", "ws") + about["socket"], **options) as socket:
        yield socket


def send(socket: ClientConnection, numbers: range) -> None:
    """Frames at 2 a second."""
    for number in numbers:
        socket.send(json.dumps({"seconds": number / 2}))
        socket.send(png(number))


def told(socket: ClientConnection, **wanted: Any) -> Any:
    """The next message that says so."""
    while True:
        message = json.loads(socket.recv(60))
        if all(message.get(name) == value for name, value in wanted.items()):
            return message


def ends(socket: ClientConnection) -> tuple[int, Any]:
    """The code with which the server closes a connection, and its error."""
    error = told(socket, type="error")["error"]
    with pytest.raises(ConnectionClosed) as e:
        socket.recv(60)
    assert e.value.rcvd is not None
    return e.value.rcvd.code, error


def body(about: Any, question: str = QUESTION, **options: Any) -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": None, "uuid": about["id"]},
        {"type": "text", "text": question},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **options}


def ask(address: str, about: Any, question: str = QUESTION, **options: Any) -> httpx2.Response:
    return httpx2.post(f"{address}/v1/chat/completions", json=body(about, question, **options), timeout=60)


def state(address: str, about: Any) -> Any:
    return httpx2.get(f"{address}/v1/live/{about['id']}").json()


def answer_alone(model: xl2jax.Model, count: int, question: str = QUESTION) -> Any:
    """The answer of the library to the same frames."""
    with model.watch_live(fps=2, memory=LiveMemory(LIVE.dense_minutes, LIVE.minutes, LIVE.host_gib)) as live:
        for number in range(count):
            live.add(number / 2, picture(number))
        return model.ask(live, question, max_new_tokens=12)


# --- frames over a WebSocket ---------------------------------------------------------------------


def test_an_answer_is_that_of_the_library(
    address: str, begin: Callable[..., Any], model: xl2jax.Model, service: Service
) -> None:
    """Whole and as a stream, by OpenAI's client too. More frames come between two questions."""
    before = metric(service, "xl2jax_live_frames_total")
    about = begin()
    assert re.fullmatch("live_[0-9a-f]{32}", about["id"])
    assert about["socket"] == f"/v1/live/{about['id']}/frames"
    assert about["settings"] | {"dense_minutes": 0, "minutes": 0} == {
        "url": None, "fps": 2, "clock": "stream", "dense_minutes": 0, "minutes": 0, "host_gib": 0.1,
    }  # fmt: skip
    assert about["settings"]["dense_minutes"] >= 0.1  # limits that are too small for the prefill are raised
    assert abs(about["created_at"] - time.time()) < 60
    assert about["expires_at"] == pytest.approx(about["created_at"] + LIVE.seconds, abs=1)
    assert ask(address, about).status_code == 400  # nothing was seen yet
    with feeding(address, about) as socket:
        send(socket, range(24))
        assert told(socket, frames=24)["seconds"] == 11.5
        expected = answer_alone(model, 24)
        first = ask(address, about, xl2jax={"chunks": True}).json()
        assert first["choices"][0]["message"]["content"] == expected.text
        shown = first["xl2jax"]["chunks"]
        assert [(c["start"], c["end"], c["dense"]) for c in shown] == [
            (c.start, c.end, c.dense) for c in expected.chunks
        ]
        all_dense = ask(address, about, xl2jax={"top_chunks": "all"})
        assert (all_dense.status_code, "bi-level" in all_dense.text) == (400, True)
        usage = first["usage"]
        assert (usage["frames"], usage["seconds_seen"], usage["video_cached"]) == (24, 11.5, True)
        assert usage["prompt_tokens"] > usage["video_tokens"] > 0
        send(socket, range(24, 32))
        told(socket, frames=32)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            options: Any = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(client.chat.completions.create(model="tiny", **body(about), **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answer_alone(model, 32).text
        assert (chunks[-1].usage.model_extra or {})["seconds_seen"] == 15.5
    after = state(address, about)
    assert (after["state"], after["frames"], after["received"], after["damaged"]) == ("watching", 32, 32, 0)
    assert after["bytes"]["device"] > 0
    assert metric(service, "xl2jax_live_videos") == 1
    assert metric(service, "xl2jax_live_frames_total") - before == 32


def test_a_session_goes_on_after_its_connection(address: str, begin: Callable[..., Any]) -> None:
    """A second connection takes the place of the first one. The time between is a gap."""
    about = begin()
    with feeding(address, about) as first:
        send(first, range(8))
        told(first, frames=8)
        with feeding(address, about) as second:
            time.sleep(0.6)
            send(second, range(1000, 1004))  # another clock
            told(second, frames=12)
            assert ends(first)[0] == REPLACED
            after = state(address, about)
            assert 3.5 + 0.6 < after["seconds"] < 3.5 + 20
            assert after["connections"] == 2


def test_frames_are_dated_by_their_arrival(address: str, begin: Callable[..., Any]) -> None:
    about = begin(fps=4, clock="wall")
    with feeding(address, about) as socket:
        for number in range(4):
            socket.send(png(number))
            time.sleep(0.3)
        assert 0.9 <= told(socket, frames=4)["seconds"] < 10


def test_what_is_no_image_is_counted(address: str, begin: Callable[..., Any]) -> None:
    """And frames above the rate are not even decoded."""
    about = begin()
    with feeding(address, about) as socket:
        for number, data in enumerate((b"", b"garbage", png(1)[:200], png(0)[:50])):
            socket.send(json.dumps({"seconds": number / 2}))
            socket.send(data)
        send(socket, range(4, 8))
        for number in range(1, 4):
            socket.send(json.dumps({"seconds": 3.5 + number / 10}))
            socket.send(b"garbage")
        after = told(socket, frames=4, received=11)
    assert after["damaged"] == 4


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        ("hello", "bad_message", "message"),
        ('{"seconds": "1"}', "bad_message", "seconds"),
        ('{"seconds": NaN}', "bad_message", "message"),
        ('{"second": 1}', "bad_message", "second"),
        ("[" * 1000, "bad_message", "more than the 256 characters"),
        (f'{{"seconds": "{"é" * 90}"}}', "bad_message", "seconds"),
        (b"x" * 150_000, "frame_too_large", "more than the 100,000 bytes"),
    ],
)
def test_what_is_not_understood_ends_the_connection(
    address: str, begin: Callable[..., Any], message: str | bytes, code: str, words: str
) -> None:
    about = begin()
    with feeding(address, about) as socket:
        socket.send(message)
        closed, error = ends(socket)
    assert (closed, error["code"]) == (BAD_MESSAGE, code)
    assert words in error["message"]
    assert state(address, about)["state"] == "watching"  # another connection can go on


def test_a_picture_of_too_many_pixels_is_not_decoded(model: xl2jax.Model, tmp_path: Path) -> None:
    limits = Limits(live=LIVE, frame_pixels=5000)
    with served(make(model, tmp_path, limits=limits)) as address:
        about = httpx2.post(f"{address}/v1/live", json={}, timeout=60).json()
        with feeding(address, about) as socket:
            socket.send(png(0))
            assert told(socket, received=1, damaged=1)["frames"] == 0


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"minutes": 0.6}, 400, "minutes: should be at most 0.5 here"),
        ({"dense_minutes": 0.2}, 400, "dense_minutes: should be at most 0.1"),
        ({"fps": 5}, 400, "fps: should be at most 4"),
        ({"fps": 0}, 400, "fps"),
        ({"fps": "1"}, 400, "fps"),
        ({"fps": 1e-310}, 400, "fps of a live video must be at least 0.001"),
        ({"host_gib": 1}, 400, "host_gib: should be at most 0.1"),
        ({"minutes": 0.01, "dense_minutes": 0.05}, 400, "must not be below dense minutes"),
        ({"clock": "sun"}, 400, "clock"),
        ({"frames": 1}, 400, "frames"),
        ({"url": "rtsp://127.0.0.1/a"}, 400, "should be https://HOST/PATH"),
        ({"url": "file:///etc/passwd"}, 400, "should be https://HOST/PATH"),
        ({"url": "http://example.com/a.ts"}, 400, "not allowed here"),
        ({"url": "http://127.0.0.1:1/a\nserving"}, 400, "characters that no address has"),
    ],
)
def test_wrong_settings(address: str, settings: dict[str, Any], status: int, words: str) -> None:
    response = httpx2.post(f"{address}/v1/live", json=settings, timeout=60)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]
    assert httpx2.get(f"{address}/v1/live").json()["data"] == []


def test_unknown_sessions(address: str, begin: Callable[..., Any]) -> None:
    nobody = {"id": "live_" + "0" * 32, "socket": f"/v1/live/live_{'0' * 32}/frames"}
    for response in (
        httpx2.get(f"{address}/v1/live/{nobody['id']}"),
        httpx2.delete(f"{address}/v1/live/{nobody['id']}"),
        ask(address, nobody),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "live_not_found")
    with pytest.raises(InvalidStatus) as e, feeding(address, nobody):
        pass
    assert e.value.response.status_code == 404
    assert json.loads(e.value.response.body)["error"]["code"] == "live_not_found"
    about = begin()
    other = {"type": "video_url", "video_url": {"url": "data:,"}, "uuid": about["id"]}
    messages = [{"role": "user", "content": [other, {"type": "text", "text": "What?"}]}]
    named = httpx2.post(f"{address}/v1/chat/completions", json={"messages": messages})
    assert named.status_code == 400
    with_frames = ask(address, about, xl2jax={"fps": 2})
    assert "chosen when it was opened" in with_frames.json()["error"]["message"]


def test_too_many_sessions_and_too_large_ones(
    address: str, begin: Callable[..., Any], model: xl2jax.Model, tmp_path: Path
) -> None:
    abouts = [begin() for _ in range(LIVE.sessions)]
    refused = httpx2.post(f"{address}/v1/live", json={})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_live_videos")
    assert "Retry-After" in refused.headers
    assert [a["id"] for a in httpx2.get(f"{address}/v1/live").json()["data"]] == [a["id"] for a in abouts][::-1]
    httpx2.delete(f"{address}/v1/live/{abouts[0]['id']}")
    begin()
    greedy = Limits(live=LiveLimits(minutes=1e5, dense_minutes=1e5))
    with served(make(model, tmp_path, limits=greedy)) as address:
        response = httpx2.post(f"{address}/v1/live", json={}, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "live_too_large")
        assert re.search(r"needs [\d.]+ GiB of device memory, more than the 1.00", response.text)
        assert httpx2.post(f"{address}/v1/live", json={"minutes": 1, "dense_minutes": 0.1}).status_code == 200


def test_a_server_without_live_videos(model: xl2jax.Model, tmp_path: Path) -> None:
    with served(make(model, tmp_path, limits=Limits())) as address:
        response = httpx2.post(f"{address}/v1/live", json={})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "no_live_videos")


def test_the_key_and_other_sites(model: xl2jax.Model, tmp_path: Path) -> None:
    """A WebSocket carries the key in its header, or as a browser does in its subprotocol."""
    service = make(model, tmp_path, api_key="k3y/+?")
    header = {"Authorization": "Bearer k3y/+?"}

    def protocols(key: str) -> Any:
        return ["xl2jax", "xl2jax.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")]

    with served(service) as address:
        assert httpx2.post(f"{address}/v1/live", json={}).status_code == 401
        assert httpx2.get(f"{address}/v1/live").status_code == 401
        about = httpx2.post(f"{address}/v1/live", json={}, headers=header, timeout=60).json()
        with feeding(address, about, additional_headers=header) as socket:
            assert socket.subprotocol is None
            told(socket, frames=0)
        with feeding(address, about, subprotocols=protocols("k3y/+?"), origin=address) as socket:
            assert socket.subprotocol == "xl2jax"
            told(socket, frames=0)
        for options, status in (
            ({}, 401),
            ({"subprotocols": protocols("other")}, 401),
            ({"subprotocols": ["xl2jax", "xl2jax.key.$"]}, 401),
            ({"additional_headers": header, "origin": "http://elsewhere.example"}, 403),
            ({"additional_headers": header, "origin": "null"}, 403),
            ({"additional_headers": header, "origin": None}, 403),
        ):
            at = address if options.get("origin", "") is not None else address.replace("127.0.0.1", "localhost")
            with pytest.raises(InvalidStatus) as e, feeding(at, about, **options):
                pass
            assert e.value.response.status_code == status
    assert metric(service, "xl2jax_requests_total", route="/v1/live/{name}/frames", status="101") == 2
    assert metric(service, "xl2jax_requests_total", route="other", status="403") == 3


# --- several at once, and the end ----------------------------------------------------------------


@pytest.mark.slow
def test_two_sessions_beside_a_video(
    address: str, begin: Callable[..., Any], model: xl2jax.Model, service: Service, clip: Path, tmp_path: Path
) -> None:
    """Each answer is that of its own frames, though everything is watched and answered at once."""
    stored = httpx2.post(f"{address}/v1/files", files={"file": clip.read_bytes()}, data={"purpose": "user_data"}).json()
    video = {"type": "file", "file": {"file_id": stored["id"]}}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": QUESTION}]}]
    sampling = {"fps": 2, "max_frames": 40}
    request = {"messages": messages, "max_tokens": 12, "xl2jax": sampling}

    def live(count: int) -> str:
        about = begin()
        with feeding(address, about) as socket:
            send(socket, range(count))
            told(socket, frames=count)
            return ask(address, about).json()["choices"][0]["message"]["content"]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(live, 12), pool.submit(live, 20)]
        plain = pool.submit(httpx2.post, f"{address}/v1/chat/completions", json=request, timeout=60)
        got = [answer.result(120) for answer in answers]
    assert got == [answer_alone(model, 12).text, answer_alone(model, 20).text]
    with model.watch(clip, xl2jax.FrameSampling(fps=2, max_frames=40)) as watched:
        expected = model.ask(watched, QUESTION, max_new_tokens=12).text
    assert plain.result().json()["choices"][0]["message"]["content"] == expected


def test_connections_that_wait_hold_up_nobody_else(
    address: str, begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many feed one session while an image of it is decoded slowly."""
    done, decode = threading.Event(), live.decode_image

    def slow(data: bytes, pixels: int) -> np.ndarray:
        assert data != b"slow" or done.wait(60)
        return decode(data, pixels)

    monkeypatch.setattr(live, "decode_image", slow)
    crowded, other = begin(), begin()
    with contextlib.ExitStack() as opened:
        opened.callback(done.set)
        opened.enter_context(feeding(address, crowded)).send(b"slow")
        wait_for(lambda: state(address, crowded)["received"] == 1)
        for _ in range(40):  # more than asyncio has threads
            opened.enter_context(feeding(address, crowded))
        with feeding(address, other) as socket:
            send(socket, range(4))
            wait_for(lambda: state(address, other)["frames"] == 4, 10)


def test_an_answer_outlives_its_session(address: str, begin: Callable[..., Any], model: xl2jax.Model) -> None:
    """Memory is freed at once; what feeds it is told."""
    about = begin()
    with feeding(address, about) as socket:
        send(socket, range(8))
        told(socket, frames=8)
        request = body(about, stream=True) | {"max_tokens": 100}
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=request, timeout=60) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            assert httpx2.delete(f"{address}/v1/live/{about['id']}").json()["deleted"]
            assert "data: [DONE]" in list(lines)
        code, error = ends(socket)
        assert (code, error["code"]) == (ENDED, "live_ended")
        assert "ended by a client" in error["message"]
    assert ask(address, about).status_code == 404


@pytest.mark.parametrize(
    ("field", "words"), [("idle_seconds", "no frame and no question came for 0.5 s"), ("seconds", "open for 0.5 s")]
)
def test_a_session_that_nobody_uses_ends(model: xl2jax.Model, tmp_path: Path, field: str, words: str) -> None:
    """Or that is too old. Its memory is free again."""
    service = make(model, tmp_path, limits=Limits(live=dataclasses.replace(LIVE, **{field: 0.5})))
    with served(service) as address:
        about = httpx2.post(f"{address}/v1/live", json={}, timeout=60).json()
        with feeding(address, about) as socket:
            code, error = ends(socket)
        assert code == ENDED
        assert words in error["message"]
        wait_for(lambda: metric(service, "xl2jax_live_videos") == 0)
        assert service.videos._reserved == service.videos._live == 0


def test_a_session_that_is_not_opened_in_time(
    model: xl2jax.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is ended when it is open at last. Other requests do not suffer from it."""
    service = make(model, tmp_path, limits=dataclasses.replace(LIMITS, request_seconds=0.5))
    given_up, opened = threading.Event(), threading.Event()
    really_open = LiveSession.open

    def slowly(session: LiveSession, *args: Any) -> None:
        really_open(session, *args)
        given_up.wait(30)
        opened.set()

    monkeypatch.setattr(LiveSession, "open", slowly)
    with served(service) as address:
        late = httpx2.post(f"{address}/v1/live", json={}, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        wait_for(lambda: service.videos._live > 0)
        given_up.set()
        assert opened.wait(30)
        wait_for(lambda: service.videos._live == 0, 10)
        assert service.live.list() == []
    assert "the engine failed" not in caplog.text


def test_a_session_that_opens_too_late(model: xl2jax.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is freed, and the engine goes on with the work of others."""
    failures: list[Exception] = []
    videos: list[Any] = []
    opened = threading.Event()
    make_video = model.watch_live

    def slow(*args: Any, **settings: Any) -> Any:
        assert opened.wait(60)
        videos.append(make_video(*args, **settings))
        return videos[0]

    service = make(model, tmp_path, limits=dataclasses.replace(LIMITS, request_seconds=0.3))
    monkeypatch.setattr(model, "watch_live", slow)
    monkeypatch.setattr(service.engine, "_fail_all", lambda error: failures.append(error))
    with served(service) as address:
        late = httpx2.post(f"{address}/v1/live", json={}, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert httpx2.get(f"{address}/v1/live").json()["data"] == []
        opened.set()
        wait_for(lambda: videos and videos[0].closed)
        assert service.videos._reserved == service.videos._live == 0
        assert failures == []


def test_the_end_of_the_server(model: xl2jax.Model, tmp_path: Path) -> None:
    service = make(model, tmp_path)
    with served(service) as address:
        about = httpx2.post(f"{address}/v1/live", json={}, timeout=60).json()
        session = service.live.get(about["id"])
        socket = connect(address.replace("http", "ws") + about["socket"])
        send(socket, range(8))
        told(socket, frames=4)
    with pytest.raises(ConnectionClosed) as e:
        socket.recv(10)
    assert e.value.rcvd is not None
    assert e.value.rcvd.code == 1012
    assert session.video.closed
    assert session.over == "the server is shutting down"


# --- from an address -----------------------------------------------------------------------------


class _Camera(http.server.BaseHTTPRequestHandler):
    """/live: a stream that is cut off the first time; /folder/hls: a playlist; /to?X: leads on to X."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, target = self.path.partition("?")
        type(self).asked.append(self.path)
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        if path == "/drip":
            self.drip(target)
            return
        data = b"This is no video." * 999
        if path == "/live":
            number = self.asked.count("/live")
            if number > 2:
                self.send_error(404)
                return
            data = mpeg_ts(4)
        elif path in ("/recording", "/folder/a.ts", "/folder/b.ts"):
            data = mpeg_ts(4)
        elif path == "/folder/hls":
            items = target.split(",") if target else ["a.ts", "b.ts"]
            data = "\n".join(["#EXTM3U", "#EXT-X-TARGETDURATION:4", *(f"#EXTINF:4,\n{i}" for i in items)]).encode()
            data += b"\n#EXT-X-ENDLIST\n"
        elif path == "/endless.m3u8":
            data = b"#EXTM3U\n" + b"#EXTINF:4,\na.ts\n" * 200_000
        self.send_response(200)
        if path == "/folder/hls":
            self.send_header("Content-Type", "application/vnd.apple.mpegurl")
        if path != "/live":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def drip(self, where: str) -> None:
        """An answer that never ends, a few bytes at a time."""
        start = {"head": b"", "body": b"\r\n", "chunk": b"Transfer-Encoding: chunked\r\n\r\n1;"}[where]
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + start)
            while True:
                self.wfile.write(b"A: b\r\n" if where == "head" else b"a")
                time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def camera() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Camera) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/recording", "/to?/recording", "/folder/hls", "/to?/folder/hls"])
def test_a_video_from_an_address(address: str, begin: Callable[..., Any], camera: str, path: str) -> None:
    about = begin(url=camera + path)
    assert about["socket"] is None
    wait_for(lambda: state(address, about)["state"] != "watching")
    after = state(address, about)
    assert (after["state"], after["reason"]) == ("ended", None)
    assert after["frames"] == (16 if "hls" in path else 8)
    answer = ask(address, about)  # what has ended can still be asked about
    assert answer.json()["usage"]["frames"] == after["frames"]
    with pytest.raises(InvalidStatus) as e, feeding(address, {"socket": f"/v1/live/{about['id']}/frames"}):
        pass
    assert e.value.response.status_code == 409


def test_a_stream_that_is_cut_off_is_opened_anew(address: str, begin: Callable[..., Any], camera: str) -> None:
    _Camera.asked.clear()
    about = begin(url=f"{camera}/live")
    wait_for(lambda: state(address, about)["frames"] >= 16)
    assert _Camera.asked.count("/live") >= 2
    assert state(address, about)["seconds"] > 8 - 0.5  # the second between is part of it


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/to?http://elsewhere.example/a.ts", "not allowed here"),
        ("/to?file:///etc/passwd", "should be https://"),
        ("/to?/to?/to?/to?/recording", "too often"),
        ("/folder/hls?http://elsewhere.example/a.ts", "not allowed here"),
        ("/endless.m3u8", "the playlist has more than"),
    ],
)
def test_what_an_address_may_not_lead_to(
    address: str, begin: Callable[..., Any], camera: str, path: str, words: str
) -> None:
    about = begin(url=camera + path)
    wait_for(lambda: state(address, about)["state"] == "failed")
    after = state(address, about)
    assert words in after["reason"]
    assert camera not in after["reason"]
    wait_for(lambda: state(address, about)["bytes"]["device"] == 0)  # it can be asked nothing
    refused = ask(address, about)
    assert refused.status_code in (400, 404)


@pytest.mark.parametrize("where", ["head", "body", "chunk"])
def test_an_address_that_never_ends_is_left(address: str, begin: Callable[..., Any], camera: str, where: str) -> None:
    """The thread that reads it ends with the session."""
    about = begin(url=f"{camera}/drip?{where}")

    def reads() -> bool:
        return any(about["id"] in thread.name for thread in threading.enumerate())

    wait_for(reads)
    time.sleep(0.3)
    httpx2.delete(f"{address}/v1/live/{about['id']}")
    wait_for(lambda: not reads(), 10)


def test_private_networks_and_no_downloads(model: xl2jax.Model, tmp_path: Path, camera: str) -> None:
    for number, (downloads, words) in enumerate(
        ((None, "downloads nothing"), (Downloads(None, 1 << 20, 5, is_public), "private network"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with served(make(model, folder, rules=MediaRules((), downloads))) as address:
            response = httpx2.post(f"{address}/v1/live", json={"url": f"{camera}/recording"}, timeout=60)
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
