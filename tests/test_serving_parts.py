"""Parts of the server by themselves: downloads, stop texts, the engine's order, the places of videos."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import GIB, make_service, metric, wait_for

import xl2jax
from xl2jax.inference.watching import Watching
from xl2jax.serving.addresses import Downloads, is_public
from xl2jax.serving.errors import RequestError
from xl2jax.serving.jobs import Begun, Ended, Event, Failed, Job, Piece, Watched
from xl2jax.serving.limits import Limits
from xl2jax.serving.media import Media
from xl2jax.serving.protocol import read_request
from xl2jax.serving.service import Service
from xl2jax.serving.stops import StopTexts
from xl2jax.serving.videos import Budgets
from xl2jax.testing import write_clip
from xl2jax.video.clip import open_video

# --- downloads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


class _Site(http.server.BaseHTTPRequestHandler):
    """/file is a file; /to?ADDRESS leads there; /endless never ends; /slow says nothing."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", query or self.path)
            self.end_headers()
            return
        if path == "/slow":
            time.sleep(2)
        self.send_response(200 if path != "/missing" else 404)
        self.end_headers()
        try:
            for _ in range(1000 if path == "/endless" else 1):
                self.wfile.write(b"x" * 1000)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetch(url: str, target: Path, **options: Any) -> int:
    """The bytes of a download that may reach this machine."""
    downloads = Downloads(
        **{"domains": None, "max_bytes": 5000, "max_seconds": 1.0, "is_allowed": lambda _: True} | options
    )
    asyncio.run(downloads.fetch(url, target))
    return target.stat().st_size


def test_a_download(site: str, tmp_path: Path) -> None:
    assert fetch(f"http://{site}/file", tmp_path / "x") == 1000
    assert fetch(f"http://{site}/to?/file", tmp_path / "x", domains=("localhost",)) == 1000


@pytest.mark.parametrize(
    ("path", "options", "status", "words"),
    [
        ("/endless", {}, 413, "more than the 5,000 bytes"),
        ("/slow", {}, 400, "not downloaded within 1 s"),
        ("/missing", {}, 400, "status 404"),
        ("/to", {}, 400, "too often"),
        ("/to?file:///etc/passwd", {}, 400, "should be https://"),
        ("/to?http://127.0.0.1/file", {"domains": ("localhost",)}, 400, "not allowed here"),
        ("/file", {"domains": ("example.com", "calhost")}, 400, "not allowed here"),
        ("/file", {"is_allowed": is_public}, 400, "private network"),
        ("/to?http://user:secret@localhost/file", {}, 400, "without a name or password"),
    ],
)
def test_refused_downloads(
    site: str, tmp_path: Path, path: str, options: dict[str, Any], status: int, words: str
) -> None:
    with pytest.raises(RequestError) as e:
        fetch(f"http://{site}{path}", tmp_path / "x", **options)
    assert e.value.status == status
    assert words in e.value.message
    assert site not in e.value.message


def test_a_name_is_checked_by_all_of_its_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name with a public and a private address is refused, and it is looked up once."""
    asked = []

    async def lookup(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(None, None, None, "", (address, port)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lookup)
    with pytest.raises(RequestError, match="private network"):
        fetch("http://example.com/file", tmp_path / "x", is_allowed=is_public)
    assert asked == ["example.com"]


# --- stop texts --------------------------------------------------------------------------------


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_texts_are_found_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    places = [text.find(stop) for stop in stops if stop in text]
    cutter, out, at = StopTexts(stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        out += cutter.add(text[at : at + size], final=at + size == len(text))
        at += size
        assert text.startswith(out)
        if cutter.found:
            break
    assert cutter.found == bool(places)
    if not places:
        assert out == text
    else:
        assert not any(stop in out for stop in stops)
        assert any(text[len(out) :].startswith(stop) for stop in stops)


# --- requests ----------------------------------------------------------------------------------

_TEXT = {"type": "text", "text": "Compare."}
_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
_PICTURES = {"xl2jax": {"treat_images_as": "pictures"}}


@pytest.mark.parametrize(
    ("parts", "text", "question"),
    [
        ([_IMAGE, _IMAGE, _TEXT], None, "Compare."),
        ([_TEXT, _IMAGE], None, "Compare."),
        ([_TEXT, _IMAGE, _IMAGE, _IMAGE, _TEXT], "Compare.\n<image> <image> <image>\n", "Compare."),
    ],
)
def test_places_of_pictures(parts: list[Any], text: str | None, question: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": parts}], **_PICTURES}).encode()
    asked = read_request(body, Limits(), "tiny", None)
    assert (asked.text, asked.question, len(asked.source.pictures)) == (text, question, parts.count(_IMAGE))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("user", [_TEXT]), ("assistant", [_TEXT]), ("user", [_IMAGE, _TEXT])], "the first message"),
        ([("user", [_IMAGE, {"type": "text", "text": "<image>"}])], "leave it out"),
        ([("user", [_IMAGE] * 17 + [_TEXT])], "17 images, more than the 16"),
        ([("user", [_IMAGE, {"type": "video_url", "video_url": {"url": "file:///a"}}, _TEXT])], "several videos"),
    ],
)
def test_pictures_that_are_refused(messages: list[tuple[str, list[Any]]], words: str) -> None:
    body = json.dumps({"messages": [{"role": r, "content": c} for r, c in messages], **_PICTURES}).encode()
    with pytest.raises(RequestError, match=words):
        read_request(body, Limits(), "tiny", None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("seed", "stop", "n", "media_io_kwargs", "mm_processor_kwargs", "xl2jax", "tools", "logit_bias", "modalities"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), JSON, st.data())
def test_any_request_is_read_or_refused(changes: dict[str, Any], part: Any, data: st.DataObject) -> None:
    """Whatever JSON a request holds, it is read or refused with a status of the client's fault."""
    video = {"type": "video_url", "video_url": {"url": "file:///v.mp4"}}
    content = data.draw(st.sampled_from([[video, part], part, [video, {"type": "text", "text": part}], [video]]))
    body = {"messages": [{"role": "user", "content": content}]} | changes
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    refused: RequestError | None = None
    try:
        asked = read_request(text, Limits(), "tiny", xl2jax.BilevelConfig())
    except RequestError as e:
        refused = e
    if refused is not None:
        assert refused.status in (400, 404)
        assert refused.message
    else:
        assert asked.question.strip()
        assert 1 <= asked.max_new_tokens <= Limits().new_tokens


# --- the engine --------------------------------------------------------------------------------


class Asker:
    """Submits questions to a service's engine and collects events."""

    def __init__(self, service: Service):
        self.service = service
        self.log: list[tuple[str, Event]] = []

    def ask(self, name: str, video: Path, *, tokens: int = 8, **settings: Any) -> Job:
        content = [
            {"type": "video_url", "video_url": {"url": video.as_uri()}},
            {"type": "text", "text": "What happens?"},
        ]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "xl2jax": settings}
        asked = read_request(json.dumps(body).encode(), self.service.limits, "tiny", self.service.bilevel)
        frames = asked.frames or xl2jax.FrameSampling()
        stat = video.stat()
        media = Media(video, f"{video.name} {stat.st_size}")
        key = self.service.videos.key(media.content, frames, None)
        job = Job(asked, key, media, frames, lambda event: self.log.append((name, event)))
        self.service.engine.submit(job)
        return job

    def events(self, name: str) -> list[Event]:
        return [event for who, event in list(self.log) if who == name]

    def ended(self, name: str) -> bool:
        return any(isinstance(event, Ended | Failed) for event in self.events(name))

    def text(self, name: str) -> str:
        wait_for(lambda: self.ended(name))
        failed = [event for event in self.events(name) if isinstance(event, Failed)]
        assert not failed, failed[0].error.message
        return "".join(event.text for event in self.events(name) if isinstance(event, Piece))


@pytest.fixture
def asker(model: xl2jax.Model, tmp_path: Path) -> Iterator[Callable[..., Asker]]:
    services = []

    def start(**options: Any) -> Asker:
        (folder := tmp_path / "service").mkdir(exist_ok=True)
        service = make_service(model, folder, **options)
        service.engine.start()
        services.append(service)
        return Asker(service)

    yield start
    for service in services:
        service.engine.stop()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three short videos of one length."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_clip(folder / f"{number}.mp4", 5, fps=8, width=64, height=64 + 2 * number)
    return sorted(folder.iterdir())


def test_a_question_waits_for_at_most_one_segment(asker: Callable[..., Asker], clip: Path, clips: list[Path]) -> None:
    a = asker()
    a.ask("first", clips[0])
    a.text("first")
    a.ask("long", clip)  # 148 frames are 3 segments
    seen: list[int] = []
    while not a.ended("long"):
        before = len([e for e in a.events("long") if isinstance(e, Watched)])
        name = f"question {len(seen)}"
        a.ask(name, clips[0])
        wait_for(lambda name=name: a.ended(name))  # type: ignore[misc]
        order = [who for who, event in list(a.log) if (who, type(event)) in (("long", Watched), (name, Begun))]
        seen.append(order.index(name) - before)
        assert a.text(name) == a.text("first")
    assert len([e for e in a.events("long") if isinstance(e, Watched)]) == 3
    assert len(seen) >= 2
    assert max(seen) <= 1
    assert a.text("long")


def test_a_question_that_comes_during_a_part_is_answered_before_the_next(
    asker: Callable[..., Asker], clip: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment has two parts, and a question that comes in either of them waits for the rest of that one only."""
    a = asker()
    a.ask("first", clips[0])
    a.text("first")
    compute, log, names = Watching.parts, list[str](), list[str]()

    def parts(watching: Watching, images: Any) -> Iterator[None]:
        inner = compute(watching, images)
        while True:
            for name in names[-1:]:
                log.append("answered" if a.ended(name) else "waits")
            names.append(f"question {len(names)}")
            a.ask(names[-1], clips[0], tokens=1)
            ended = next(inner, "ended")
            assert not a.events(names[-1])
            if ended:
                return
            yield

    monkeypatch.setattr(Watching, "parts", parts)
    a.ask("long", clip)  # 148 frames are 3 segments
    a.text("long")
    wait_for(lambda: a.ended(names[-1]))
    assert log == ["answered"] * 5


def test_the_parts_of_a_segment_are_the_segment(model: xl2jax.Model, clips: list[Path]) -> None:
    clip = open_video(clips[0], xl2jax.FrameSampling())
    watching, counts = model.start_watch(clip), []
    for frames in watching.batches():
        assert watching.done < watching.total
        counts.append(sum(1 for _ in watching.parts(frames)))
    assert (watching.done, set(counts)) == (watching.total, {1})
    with model.adopt(watching.finish()) as video, model.watch(clips[0]) as whole:
        assert model.ask(video, "What?", max_new_tokens=8).text == model.ask(whole, "What?", max_new_tokens=8).text
        for one, other in zip(jax.tree.leaves(video.kv.cache), jax.tree.leaves(whole.kv.cache), strict=True):
            assert (np.asarray(one) == np.asarray(other)).all()


@pytest.mark.parametrize("finish", [False, True])
def test_a_video_whose_clients_have_gone(
    asker: Callable[..., Asker], clip: Path, clips: list[Path], finish: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Watching.parts

    def slowly(watching: Watching, images: Any) -> Iterator[None]:
        yield from parts(watching, images)
        time.sleep(0.2)

    monkeypatch.setattr(Watching, "parts", slowly)
    a = asker(finish_abandoned=finish)
    job = a.ask("gone", clip)
    wait_for(lambda: any(isinstance(e, Watched) for e in a.events("gone")))
    a.service.engine.cancel(job)
    if finish:
        wait_for(lambda: a.service.videos.place(job.key) is not None)
    else:
        wait_for(lambda: metric(a.service, "xl2jax_questions_cancelled_total") == 1)
        frames = metric(a.service, "xl2jax_watched_frames_total")
        a.ask("next", clips[0])
        assert a.text("next")
        assert a.service.videos.place(job.key) is None
        assert frames < 148
    assert not a.ended("gone")


def test_a_cancelled_answer_stops_within_eight_tokens(asker: Callable[..., Asker], clips: list[Path]) -> None:
    a = asker()
    job = a.ask("x", clips[0], tokens=2000)
    wait_for(lambda: metric(a.service, "xl2jax_generated_tokens_total") > 0)
    a.service.engine.cancel(job)
    before = metric(a.service, "xl2jax_generated_tokens_total")
    wait_for(lambda: metric(a.service, "xl2jax_questions_cancelled_total") == 1)
    assert metric(a.service, "xl2jax_generated_tokens_total") - before <= 8
    assert not a.ended("x")


def test_an_unreadable_video_fails_its_own_question_only(
    asker: Callable[..., Asker], clips: list[Path], tmp_path: Path
) -> None:
    a = asker(limits=Limits(frame_pixels=5000))
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    large = tmp_path / "large.mp4"
    write_clip(large, 1, fps=8, width=128, height=64)
    a.ask("bad", tmp_path / "bad.mp4")
    a.ask("large", large)
    a.ask("good", clips[0])
    assert a.text("good")
    for name, words in (("bad", "not a video"), ("large", "128 x 64 pixels")):
        (failed,) = a.events(name)
        assert isinstance(failed, Failed)
        assert failed.error.status == 400
        assert words in failed.error.message
        assert str(tmp_path) not in failed.error.message


# --- where videos are kept ---------------------------------------------------------------------


def kv_bytes(model: xl2jax.Model, video: Path) -> int:
    with model.watch(video) as watched:
        model.ask(watched, "What happens?", max_new_tokens=1)
        return watched.device_bytes


def test_videos_move_to_the_host_and_to_the_disk_and_back(
    asker: Callable[..., Asker], model: xl2jax.Model, clips: list[Path]
) -> None:
    most = max(kv_bytes(model, clip) for clip in clips)
    a = asker(budgets=Budgets(int(1.5 * most), int(1.5 * most), GIB))
    jobs = {}
    for number, clip in enumerate(clips):
        jobs[number] = a.ask(f"{number} first", clip)
        a.text(f"{number} first")
    wait_for(lambda: len(list(a.service.uploads._folder.parent.glob("videos/*.kv"))) == 3)
    assert [a.service.videos.place(jobs[n].key) for n in range(3)] == ["disk", "host", "device"]
    frames = metric(a.service, "xl2jax_watched_frames_total")
    for number in (1, 0, 2, 1, 0):
        name = f"{number} again {time.monotonic()}"
        a.ask(name, clips[number])
        assert a.text(name) == a.text(f"{number} first")
        assert metric(a.service, "xl2jax_kv_bytes", place="device") <= 1.5 * most
    assert metric(a.service, "xl2jax_watched_frames_total") == frames


def test_a_restart_finds_videos_and_watches_damaged_ones_again(
    asker: Callable[..., Asker], clips: list[Path], tmp_path: Path
) -> None:
    a = asker()
    for number, clip in enumerate(clips[:2]):
        a.ask(f"{number}", clip)
        a.text(f"{number}")
    a.service.engine.stop()
    files = sorted((tmp_path / "service" / "videos").glob("*.kv"), key=os.path.getmtime)
    assert len(files) == 2
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 1
    files[1].write_bytes(data)
    left = tmp_path / "service" / "videos" / f".x.kv.incomplete-{os.uname().nodename}-999999999-0.1"
    left.write_bytes(b"of a killed writer")
    b = asker()
    assert not left.exists()
    for number, clip in enumerate(clips[:2]):
        b.ask(f"{number}", clip)
        assert b.text(f"{number}") == a.text(f"{number}")
    frames = metric(b.service, "xl2jax_watched_frames_total")
    assert frames == next(e for e in a.events("1") if isinstance(e, Watched)).total
    assert len(list((tmp_path / "service" / "videos").iterdir())) == 2


def test_the_disk_budget_keeps_the_latest(asker: Callable[..., Asker], clips: list[Path], tmp_path: Path) -> None:
    a = asker()
    a.ask("0", clips[0])
    a.text("0")
    a.service.engine.stop()
    (file,) = (tmp_path / "service" / "videos").glob("*.kv")
    b = asker(budgets=Budgets(GIB, 0, int(1.5 * file.stat().st_size)))
    b.ask("1", clips[1])
    b.text("1")
    b.service.engine.stop()
    (kept,) = (tmp_path / "service" / "videos").glob("*.kv")
    assert kept != file


def test_a_video_beyond_the_budget_is_refused(asker: Callable[..., Asker], clips: list[Path]) -> None:
    a = asker(budgets=Budgets(1000, 0, 0))
    a.ask("x", clips[0])
    wait_for(lambda: a.ended("x"))
    (failed,) = a.events("x")
    assert isinstance(failed, Failed)
    assert (failed.error.status, failed.error.code) == (400, "video_too_large")
