"""The page at `/`, as a browser shows it: the system's Chromium and a real server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from serving import make_service, served

import xl2jax
from xl2jax.commands.demo_clip import demo_questions
from xl2jax.evaluation.scenes import make_scene, write_scene
from xl2jax.inference.watching import Watching
from xl2jax.serving.limits import Limits
from xl2jax.serving.media import MediaRules
from xl2jax.serving.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)"),
]

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "xl2jax" / "serving" / "page").iterdir())
LIMITS = Limits(queue=4, video_bytes=1 << 20, new_tokens=60)
DURATION = 30
SEED, GROUPS, CHUNK_SECONDS = 3, 32, 16.0  # of the video for the bundled checkpoint

expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """A folder with a video of 30 seconds, and a file that is no video."""
    folder = tmp_path_factory.mktemp("media")
    shutil.copyfile(clip, folder / "demo.mp4")  # with the sampling of other tests, so that programs are compiled once
    (folder / "text.mp4").write_text("This is no video.")
    return folder


@pytest.fixture(scope="module")
def service(model: xl2jax.Model, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make_service(model, tmp_path_factory.mktemp("page"), limits=LIMITS, rules=MediaRules((media,)))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root with it
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page in a new tab. Faults of its programs, and what its policy refuses, fail the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda m: faults.append(m.text) if m.type == "error" and "Failed to load" not in m.text else None
    )
    page.goto(address)
    yield page
    context.close()
    assert faults == []


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        yield page


def open_video(page: Page, path: Path) -> None:
    page.get_by_label("Choose a file").set_input_files(path)
    expect(page.locator("#status")).to_contain_text("Ready")


def ask(page: Page, question: str) -> Locator:
    """Asks, and waits for the end of the answer: its card."""
    card = page.get_by_role("listitem").nth(page.get_by_role("listitem").count())
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(card.locator(".question")).to_have_text(question)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    return card


def bars(page: Page) -> Locator:
    return page.get_by_role("toolbar").get_by_role("button")


def expect_position(page: Page, seconds: float) -> None:
    page.wait_for_function("t => Math.abs(document.getElementById('player').currentTime - t) < 0.01", arg=seconds)


def answer_with(body: str, status: int = 200, headers: dict[str, str] | None = None) -> Callable[[Route], None]:
    """Answers chat requests in place of the server."""
    return lambda route: route.fulfill(
        status=status, headers={"Content-Type": "text/event-stream"} | (headers or {}), body=body
    )


def assert_accessible(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    assert [(v["id"], [n["target"] for n in v["nodes"]], v["help"]) for v in found] == []


QUESTION = "Which shape is red?"
CHAT = "**/v1/chat/completions"
PIECE = 'data: {"choices": [{"index": 0, "delta": {"content": "It is at 0:23"}, "finish_reason": null}]}\n\n'

END = 'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "xl2jax": {"chunks": []}}\n\ndata: [DONE]\n\n'


def ask_directly(address: str, media: Path, question: str) -> dict[str, Any]:
    video = {"type": "video_url", "video_url": {"url": (media / "demo.mp4").as_uri()}}
    content = [video, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "xl2jax": {"chunks": True}}
    return httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()


def names(page: Page) -> list[str]:
    return [str(bar.get_attribute("aria-label")) for bar in bars(page).all()]


def test_an_answer_and_its_timeline(page: Page, media: Path, address: str) -> None:
    expect(page.get_by_role("banner")).to_contain_text("tiny")
    open_video(page, media / "demo.mp4")
    expect(page.locator("#status")).to_contain_text("148 frames")
    expect(page.locator(".strip canvas").last).to_be_visible()
    expect(bars(page)).to_have_count(10)
    expect(bars(page).nth(2)).to_have_accessible_name("Chunk 3: 0:06 to 0:09")  # nothing was asked yet

    page.evaluate(
        """() => {
          window.seen = new Set();
          const turns = document.getElementById("turns");
          const look = () => seen.add(turns.querySelector(".answer")?.textContent ?? "");
          new MutationObserver(look).observe(turns, { childList: true, subtree: true, characterData: true });
        }"""
    )
    card = ask(page, QUESTION)
    expected = ask_directly(address, media, QUESTION)
    answer = expected["choices"][0]["message"]["content"]
    assert card.locator(".answer").text_content() == answer
    seen = sorted(page.evaluate("[...seen]"), key=len)
    assert len(seen) > 3  # the answer streams
    assert all(answer.startswith(text) for text in seen)

    chunks = expected["xl2jax"]["chunks"]
    top = max(c["score"] for c in chunks)
    shown = names(page)
    assert [n.rpartition(", ")[2] for n in shown] == ["dense" if c["dense"] else "pooled" for c in chunks]
    for chunk, name, bar in zip(chunks, shown, bars(page).all(), strict=True):
        assert f"relevance {100 * chunk['score'] / top:.0f} %" in name
        assert (bar.locator(".dense").count() == 1) == chunk["dense"]
        assert bar.locator(".bar").evaluate("bar => parseFloat(bar.style.height)") == pytest.approx(
            max(4, 100 * chunk["score"] / top), rel=1e-3
        )
        assert bar.evaluate("bar => parseFloat(bar.style.left)") == pytest.approx(
            100 * chunk["start"] / DURATION, abs=0.1
        )
    dense = sum(c["dense"] for c in chunks)
    expect(page.locator(".readout")).to_have_text(f"{dense} of 10 chunks were read densely for this question.")
    expect(page.get_by_role("toolbar")).to_have_accessible_name(f"Relevance to: {QUESTION}")

    bars(page).nth(2).click()
    expect_position(page, chunks[2]["start"])
    page.wait_for_function("parseFloat(document.querySelector('.playhead').style.left) > 20")
    page.keyboard.press("ArrowRight")
    expect(bars(page).nth(3)).to_be_focused()
    expect(page.locator(".readout")).to_have_text(shown[3])
    page.keyboard.press("Enter")
    expect_position(page, chunks[3]["start"])
    page.keyboard.press("End")
    expect(bars(page).last).to_be_focused()
    strip = page.locator(".strip").bounding_box()
    assert strip is not None
    page.mouse.click(strip["x"] + strip["width"] / 4, strip["y"] + 10)
    page.wait_for_function("Math.abs(document.getElementById('player').currentTime - 7.5) < 0.1")

    other = ask(page, "And which one is blue?")
    expect(page.get_by_role("toolbar")).to_have_accessible_name("Relevance to: And which one is blue?")
    other_shown = names(page)
    assert card.locator(".answer").text_content() == answer
    card.get_by_role("button", name="Show on timeline").click()
    expect(page.get_by_role("toolbar")).to_have_accessible_name(f"Relevance to: {QUESTION}")
    assert names(page) == shown != other_shown
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert_accessible(page)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360

    page.reload()
    expect(page.locator("#status")).to_contain_text("watched before")
    expect(page.locator(".question")).to_have_text([QUESTION, "And which one is blue?"])
    assert page.locator(".answer").first.text_content() == answer
    assert names(page) == shown
    expect(page.locator(".strip canvas").last).to_be_visible()
    bars(page).nth(2).click()
    expect_position(page, chunks[2]["start"])
    other.get_by_role("button", name="Show on timeline").click()
    assert names(page) == other_shown
    page.get_by_role("button", name="New video").click()
    expect(page.get_by_role("heading", name="Ask a video")).to_be_visible()
    expect(page.locator("#announcer")).to_have_text("")
    page.reload()
    expect(page.get_by_role("heading", name="Ask a video")).to_be_visible()


@pytest.mark.slow
def test_the_bundled_checkpoint(browser: Browser, tmp_path: Path) -> None:
    """Right answers, whose times are links."""
    write_scene(tmp_path / "demo.mp4", make_scene(SEED, GROUPS), width=320, height=180)
    questions = {q.kind: q for q in demo_questions(make_scene(SEED, GROUPS), 1)}
    service = make_service(xl2jax.load(ROOT / "checkpoints" / "demo"), tmp_path)
    with served(service) as address, opened(browser, address) as page:
        open_video(page, tmp_path / "demo.mp4")
        timed = ask(page, questions["time"].text)
        expect(timed.locator(".answer")).to_have_text(questions["time"].answer)
        seconds = float(re.findall(r"[\d.]+", questions["time"].answer)[0])
        timed.get_by_role("link", name=f"{seconds} seconds").click()
        expect_position(page, seconds)
        assert "relevance 100 %" in names(page)[int(seconds // CHUNK_SECONDS)]
        assert names(page)[int(seconds // CHUNK_SECONDS)].endswith("dense")
        coloured = ask(page, questions["colour_of"].text)
        expect(coloured.locator(".answer")).to_have_text(questions["colour_of"].answer)


def test_the_answer_is_announced_once_and_settings_are_sent(page: Page, media: Path) -> None:
    page.evaluate(
        """() => {
          window.said = [];
          const announcer = document.getElementById("announcer");
          new MutationObserver(() => said.push(announcer.textContent)).observe(announcer, { childList: true });
        }"""
    )
    open_video(page, media / "demo.mp4")
    page.get_by_text("Settings").click()
    answer = ask(page, QUESTION).locator(".answer").text_content()
    said = page.evaluate("window.said")
    assert [text for text in said if text.startswith("Answer")] == [f"Answer: {answer}"]
    assert said[0] == "Uploading…"
    assert any(text.startswith("Uploaded ") for text in said)
    assert any(text.startswith("Ready: ") for text in said)
    page.get_by_label("Chunks kept dense").fill("most")
    card = ask(page, "What happens?")
    expect(card.get_by_role("alert")).to_contain_text("top_chunks")
    page.route(CHAT, answer_with(PIECE + END))
    page.get_by_label("Chunks kept dense").fill("all")
    with page.expect_request(CHAT) as asked:
        ask(page, "And then?")
    body = asked.value.post_data_json
    assert body["xl2jax"] == {"chunks": True, "top_chunks": "all"}
    assert len(body["messages"]) == 1
    expect(bars(page)).to_have_count(1)
    expect(bars(page)).to_have_accessible_name("Whole video: 0:00 to 0:30, not scored, dense")
    page.get_by_label("A question may refer to earlier ones").check()
    with page.expect_request(CHAT) as asked:
        ask(page, "And then?")
    body = asked.value.post_data_json
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert body["messages"][0]["content"][0]["type"] == "file"
    assert body["messages"][1]["content"] == answer


def test_watching_is_seen_and_stopped(page: Page, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, go_on = Watching.parts, threading.Event()

    def held(self: Watching, images: Any) -> Iterator[None]:
        if self.done:
            go_on.wait(20)  # before the second segment
        yield from parts(self, images)

    monkeypatch.setattr(Watching, "parts", held)
    page.get_by_text("Settings").click()
    page.get_by_label("Frames a second").fill("8")  # other frames than anybody else has watched
    page.get_by_label("Choose a file").set_input_files(media / "demo.mp4")
    words = page.locator("#progress-text")
    expect(words).to_have_text(re.compile(r"^Watched \d+ of \d+ frames · [\d.]+ frames/s · \d+ s left$"))
    expect(page.get_by_role("progressbar")).to_have_attribute("value", re.compile(r"^0\.\d+$"))
    page.get_by_label("Question", exact=True).fill("What happens?")
    page.get_by_role("button", name="Ask", exact=True).click()
    card = page.get_by_role("listitem").first
    expect(card.locator(".note")).to_have_text("Waiting for the video…")
    page.get_by_role("button", name="Stop").click()
    expect(card.locator(".note")).to_have_text("Stopped.")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_contain_text("not watched to its end")
    go_on.set()
    page.get_by_label("Frames a second").fill("")
    card.get_by_role("button", name="Ask again").click()
    expect(page.get_by_role("listitem").last.locator(".note")).to_contain_text("dense")


def test_links(page: Page, media: Path) -> None:
    link = page.get_by_label("Or paste a link")
    link.fill("talk.mp4")
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("alert")).to_have_text("A link begins with https://, http:// or file://.")
    link.fill("https://videos.example/talk.mp4")
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("alert")).to_contain_text("This server downloads nothing")
    expect(page.locator("#announcer")).to_have_text("")  # not that the server fetches it
    assert_accessible(page)
    page.get_by_role("button", name="New video").click()
    expect(page.get_by_label("Choose a file")).to_be_focused()
    link.fill((media / "demo.mp4").as_uri())
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Ready")
    expect(page.get_by_text("A linked video is not played here")).to_be_visible()
    expect(page.locator(".strip")).to_be_hidden()
    page.route(CHAT, answer_with(PIECE + END))
    card = ask(page, QUESTION)
    page.unroute(CHAT)
    ask(page, QUESTION)
    card.get_by_role("link", name="0:23").click()
    expect(bars(page).nth(7)).to_be_focused()
    page.reload()
    expect(page.locator("#status")).to_contain_text("watched before")
    expect(card.get_by_role("link")).to_be_visible()


def test_a_video_is_dropped_and_a_link_is_pasted(page: Page, media: Path) -> None:
    transfer = page.evaluate_handle(
        """bytes => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "dropped.mp4", { type: "video/mp4" }));
          return transfer;
        }""",
        list((media / "demo.mp4").read_bytes()),
    )
    link = (media / "demo.mp4").as_uri()
    page.evaluate(
        """link => {
          const transfer = new DataTransfer();
          transfer.setData("text/plain", link);
          document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
        }""",
        link,
    )
    expect(page.get_by_label("Or paste a link")).to_have_value(link)
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("dropping")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("started")
    expect(page.get_by_role("heading", name="dropped.mp4")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("Ready")


def test_videos_that_are_refused(page: Page, media: Path, tmp_path: Path, service: Service) -> None:
    page.get_by_label("Choose a file").set_input_files(media / "text.mp4")
    alert = page.locator("#video-error")
    expect(alert).to_contain_text("The video", ignore_case=True)
    assert str(media) not in alert.inner_text()
    expect(page.get_by_text("This browser cannot play the file.")).to_be_visible()
    expect(page.locator("#announcer")).to_have_text("")  # not that it is opened
    (tmp_path / "large.mp4").write_bytes(bytes(3 << 20))
    page.get_by_role("button", name="New video").click()
    page.get_by_label("Choose a file").set_input_files(tmp_path / "large.mp4")
    expect(alert).to_contain_text("The video has more than the 1,048,576 bytes that are read.")
    page.get_by_role("button", name="New video").click()
    open_video(page, media / "demo.mp4")  # one can go on
    assert next(about["filename"] for about in service.uploads.list()) == "demo.mp4"


def test_an_upload_that_is_gone(page: Page, media: Path, service: Service, address: str) -> None:
    open_video(page, media / "demo.mp4")
    ask(page, "What happens?")
    kept = page.evaluate("JSON.parse(sessionStorage.getItem('xl2jax.page')).source.file.id")
    part = httpx2.get(f"{address}/v1/files/{kept}/content", headers={"Range": "bytes=10-19"})  # as players read
    assert (part.status_code, part.content) == (206, (media / "demo.mp4").read_bytes()[10:20])
    service.uploads.remove(kept)
    page.reload()
    expect(page.locator("#video-error")).to_contain_text("The server does not have this video any more.")
    expect(page.locator(".question")).to_have_text("What happens?")
    expect(ask(page, "And then?").get_by_role("alert")).to_have_text("There is no file of this id.")


def test_answers_that_fail(page: Page, media: Path, service: Service) -> None:
    open_video(page, media / "demo.mp4")
    service.in_flight += LIMITS.queue
    try:
        alert = ask(page, "What happens?").get_by_role("alert")
        expect(alert).to_have_text(re.compile(r"^The server is busy with other requests\. Try again in \d+ s\.$"))
    finally:
        service.in_flight -= LIMITS.queue
    for body, expected in (
        (
            ": watched 16 of 148 frames\n\n" + PIECE,
            "The connection to the server was lost before the end.",
        ),
        (PIECE + 'data: {"error": {"message": "the server is shutting down"}}\n\n', "The server is shutting down."),
    ):
        page.route(CHAT, answer_with(body))
        card = ask(page, "What happens?")
        expect(card.get_by_role("alert")).to_have_text(expected)
        expect(card.locator(".answer")).to_have_text("It is at 0:23")  # what came is kept
        page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    card = ask(page, "What happens?")
    expect(card.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    assert_accessible(page)
    page.unroute(CHAT)
    card.get_by_role("button", name="Ask again").click()
    expect(page.get_by_role("listitem").last.locator(".note")).to_contain_text("dense")


@pytest.mark.parametrize("size", [(360, 740), (390, 844)])
def test_the_newest_answer_is_in_sight_on_a_phone(page: Page, media: Path, size: tuple[int, int]) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    open_video(page, media / "demo.mp4")
    for text in ("It is red.", "It moves to the left. " * 9, "It moves to the left. " * 90):
        page.route(CHAT, answer_with(PIECE.replace("It is at 0:23", text) + END))
        card = ask(page, QUESTION)
        box, bar = card.bounding_box(), page.locator("#ask").bounding_box()
        assert box is not None
        assert bar is not None
        assert box["y"] + box["height"] <= bar["y"]
        assert bar["y"] + bar["height"] <= size[1]
        if len(text) < 1000:
            assert box["y"] >= 0  # the question too
        page.unroute(CHAT)
    page.evaluate("scrollTo(0, 0)")
    page.evaluate("document.querySelector('#turns button:not([hidden])').focus()")
    button, bar = page.locator("#turns button:focus").bounding_box(), page.locator("#ask").bounding_box()
    assert button is not None
    assert bar is not None
    assert button["y"] + button["height"] <= bar["y"]


def test_a_link_keeps_the_focus_while_another_question_is_answered(page: Page, media: Path) -> None:
    open_video(page, media / "demo.mp4")
    page.route(CHAT, answer_with(PIECE + END))
    link = ask(page, QUESTION).get_by_role("link", name="0:23")
    page.unroute(CHAT)
    page.get_by_label("Question", exact=True).fill("And then?")
    link.focus()
    page.evaluate("document.getElementById('ask').requestSubmit()")
    expect(page.get_by_role("listitem").last.locator(".note")).to_contain_text("dense")
    expect(link).to_be_focused()


@pytest.mark.parametrize("waits_for", ["models", "files/"])
def test_a_video_is_opened_while_another_one_is_restored(
    page: Page, media: Path, tmp_path: Path, waits_for: str
) -> None:
    open_video(page, media / "demo.mp4")
    shutil.copyfile(media / "demo.mp4", tmp_path / "new.mp4")
    held: list[Route] = []
    page.route(
        re.compile(f"/v1/{waits_for}[^/]*$"), lambda r: held.append(r) if r.request.method == "GET" else r.continue_()
    )
    page.reload()
    for _ in range(100):
        if held:
            break
        page.wait_for_timeout(20)
    answer = held[0].fetch()
    uploads: list[str] = []
    page.on("request", lambda r: uploads.append(r.url) if r.url.endswith("/v1/files") else None)
    page.get_by_label("Choose a file").set_input_files(tmp_path / "new.mp4")
    held[0].fulfill(response=answer)
    expect(page.locator("#status")).to_contain_text("Ready")
    expect(page.get_by_role("heading", name="new.mp4")).to_be_visible()
    assert len(uploads) == 1
    assert page.evaluate("document.getElementById('player').src").startswith("blob:")  # the new one
    expect(ask(page, QUESTION).locator(".note")).to_contain_text("dense")


def test_the_storage_of_the_browser_is_full(page: Page, media: Path) -> None:
    open_video(page, media / "demo.mp4")
    page.evaluate(
        """() => {
          for (let size = 1 << 23; size; size >>= 1) {
            try {
              sessionStorage.setItem(`filler ${size}`, "x".repeat(size));
            } catch {
              // The next one is smaller.
            }
          }
        }"""
    )
    page.route(CHAT, answer_with(PIECE.replace("It", "Long text " * 999) + END))
    expect(ask(page, QUESTION).locator(".note")).to_contain_text("dense")
    notice = page.get_by_text("The browser has no room left")
    expect(notice).to_be_visible()
    expect(ask(page, "And then?").locator(".note")).to_contain_text("dense")
    page.evaluate(
        "for (const key of Object.keys(sessionStorage)) if (key.startsWith('filler')) sessionStorage.removeItem(key)"
    )
    ask(page, "And now?")
    expect(notice).to_be_hidden()
    page.unroute(CHAT)
    page.reload()
    expect(page.locator("#status")).to_contain_text("watched before")
    expect(page.locator(".question")).to_have_text([QUESTION, "And then?", "And now?"])


def test_a_key_is_asked_for(page: Page, media: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "api_key", "right")
    page.reload()
    dialog = page.get_by_role("dialog", name="This server needs an API key")
    expect(dialog).to_be_visible()
    assert_accessible(page)
    page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    for key in ("wrong", "right"):
        page.get_by_label("API key", exact=True).fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(dialog.get_by_role("alert")).to_have_text("The server does not accept this API key.")
    expect(dialog).to_be_hidden()
    open_video(page, media / "demo.mp4")
    page.reload()
    expect(page.locator(".strip canvas").last).to_be_visible()  # the player sends no key: it has a copy
    assert page.evaluate("localStorage.length") == 0


def test_the_start_by_keyboard(page: Page) -> None:
    assert_accessible(page)
    page.emulate_media(color_scheme="dark")
    assert_accessible(page)
    focused = []
    for _ in range(5):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert focused == ["file", "url", "Open", "camera", "Settings"]
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_times_in_text(page: Page) -> None:
    cases: dict[str, list[tuple[str, float]]] = {
        "At 116.0 seconds.": [("116.0 seconds", 116)],
        "12 s, 7s and 1 second": [("12 s", 12), ("7s", 7), ("1 second", 1)],
        "from 1:23 to 00:01:30.5": [("1:23", 83), ("00:01:30.5", 90.5)],
        "1:02:03, then 2 min 5 s": [("1:02:03", 3723), ("2 min 5 s", 125)],
        "12 to 15 seconds, 3-4.5 s": [("12", 12), ("15 seconds", 15), ("3", 3), ("4.5 s", 4.5)],
        "at 4000 s": [],  # behind the end of the video
        "1080p, 3:2, 1:75, 12 squares, 5 steps, v1.2 s, 1:99:03": [],
        "": [],
    }
    split = "texts => import('./page/times.js').then(m => texts.map(text => m.splitTimes(text, 3800)))"
    for (text, expected), parts in zip(cases.items(), page.evaluate(split, list(cases)), strict=True):
        assert [(p["text"], p["seconds"]) for p in parts if p["seconds"] is not None] == expected, text
        assert "".join(p["text"] for p in parts) == text
    shown = page.evaluate(
        "() => import('./page/times.js').then(m => [[0, 83.9, 3723].map(m.clock), [0.2, 59, 125, 4200].map(m.inWords)])"
    )
    assert shown == [["0:00", "1:23", "1:02:03"], ["1 s", "59 s", "2 min 5 s", "1 h 10 min"]]


def test_speed_and_time_left(page: Page) -> None:
    words = page.evaluate(
        """() => import('./page/progress.js').then(({ Tracker }) => {
          const [watching, uploading] = [new Tracker(0), new Tracker(0)];
          return [
            watching.watched(16, 128, 4000), watching.watched(32, 128, 6000), watching.watched(128, 128, 18000),
            uploading.uploaded(0, 2.5e9, 0), uploading.uploaded(5e8, 2.5e9, 20000),
          ];
        })"""
    )
    assert words == [
        "Watched 16 of 128 frames · 4.0 frames/s · 28 s left",
        "Watched 32 of 128 frames · 8.0 frames/s · 12 s left",
        "Watched 128 of 128 frames",
        "Uploaded 0 kB of 2.50 GB",
        "Uploaded 500 MB of 2.50 GB · 25.0 MB/s · 1 min 20 s left",
    ]


def test_an_answer_is_never_html(page: Page) -> None:
    text = "<img src=x onerror=alert(1)> at 0:05 <b>bold</b>"
    nodes = page.evaluate(
        """text => import('./page/cards.js').then(({ linked }) =>
          linked(text, 60, () => {}).map((node) => [node.nodeName, node.textContent]))""",
        text,
    )
    assert nodes == [["#text", "<img src=x onerror=alert(1)> at "], ["A", "0:05"], ["#text", " <b>bold</b>"]]
    programs = "".join(path.read_text() for path in FILES if path.suffix == ".js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", programs)


def test_the_files_are_guarded(address: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "api_key", "key")  # which the page is shown without
    for name in ("", *(f"page/{path.name}" for path in FILES)):
        response = httpx2.get(f"{address}/{name}")
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?:|\*", policy)
        assert response.headers["x-content-type-options"] == "nosniff"
        others = set(re.findall(r"https?://\w[^\s\"'<]*", response.text)) - {"http://www.w3.org/2000/svg"}
        assert others == set()
    for name in ("page/../app.py", "page/app.py", "page/%2e%2e/app.py", "page/"):
        assert httpx2.get(f"{address}/{name}").status_code in (401, 404)
    assert httpx2.get(f"{address}/v1/models").status_code == 401
