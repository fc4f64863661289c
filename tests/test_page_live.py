"""The page's camera, with Chromium's fake one and a real server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import make_service, served, wait_for
from test_page import CHAT, CHROMIUM, ask, assert_accessible, bars, opened

import xl2jax
from xl2jax.serving.limits import Limits, LiveLimits
from xl2jax.serving.service import Service

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)"),
]

LIMITS = Limits(queue=4, new_tokens=60, live=LiveLimits(sessions=2, fps=8, minutes=0.5, dense_minutes=0.1))
KEY = "k3y/+?"


@pytest.fixture(scope="module")
def service(model: xl2jax.Model, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make_service(model, tmp_path_factory.mktemp("page-live"), limits=LIMITS)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Its camera shows a moving picture, and may be used without a question."""
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*camera, *sandbox])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        yield page


def watch(page: Page) -> None:
    page.get_by_text("Settings").click()
    page.get_by_label("Frames a second").fill("8")
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#live-state")).to_have_text(re.compile(r"^Watching · 0:\d\d seen"))


@pytest.mark.slow
def test_questions_while_the_camera_is_watched(page: Page, service: Service, address: str) -> None:
    page.evaluate(
        """() => {
          window.said = [];
          const announcer = document.getElementById("announcer");
          new MutationObserver(() => said.push(announcer.textContent)).observe(announcer, { childList: true });
        }"""
    )
    page.get_by_role("button", name="Use the camera").focus()
    page.get_by_text("Settings").click()
    page.get_by_label("Frames a second").fill("8")
    page.get_by_role("button", name="Use the camera").press("Enter")
    page.get_by_label("Question", exact=True).fill("What is shown?")  # before anything was seen
    page.keyboard.press("Enter")
    card = page.get_by_role("listitem").first
    expect(card.locator(".answer")).not_to_be_empty()
    expect(page.locator("#live-state")).to_have_text(re.compile(r"^Watching · 0:\d\d seen"))
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    assert page.locator("#view").evaluate("view => view.videoWidth") > 0
    said = page.evaluate("window.said")
    assert said[:2] == ["Starting the camera…", "The server watches the camera. Ask about what it sees."]

    (session,) = service.live.list()
    seen = session.video.seconds
    wait_for(lambda: session.video.seconds > seen + 2)
    with page.expect_request(CHAT) as asked:
        ask(page, "And now?")
    sent = asked.value.post_data_json
    assert sent["messages"][0]["content"][0] == {"type": "video_url", "video_url": None, "uuid": session.id}
    assert sent["xl2jax"] == {"chunks": True}  # the rate was chosen before
    assert bars(page).count() >= 1
    end = page.locator(".axis span").last.inner_text()
    assert end != "0:00"
    assert_accessible(page)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360

    page.get_by_role("button", name="Stop the camera").click()
    expect(page.locator("#live-state")).to_have_text(re.compile(r"^The camera is off · 0:\d\d seen"))
    expect(page.get_by_role("button", name="Start the camera")).to_be_focused()
    assert page.locator("#view").evaluate("view => view.srcObject") is None
    ask(page, "What was it?")
    page.get_by_role("button", name="Start the camera").click()
    wait_for(lambda: session.connections == 2)
    expect(page.locator("#live-state")).to_contain_text("Watching")

    page.reload()
    expect(page.locator("#live-state")).to_have_text("The camera is off. Start it to go on.")
    expect(page.locator(".question")).to_have_text(["What is shown?", "And now?", "What was it?"])
    page.get_by_role("button", name="Start the camera").click()
    wait_for(lambda: session.connections == 3)
    expect(page.locator("#live-state")).to_contain_text("Watching")
    page.get_by_role("button", name="New video").click()
    expect(page.get_by_role("heading", name="Ask a video")).to_be_visible()
    wait_for(lambda: not service.live.list())
    assert session.video.closed


def test_a_live_video_that_the_server_ended(page: Page, service: Service) -> None:
    watch(page)
    (session,) = service.live.list()
    service.live.end(session, "it was ended by a client")
    alert = page.locator("#video-error")
    expect(alert).to_contain_text("This live video has ended: it was ended by a client.")
    expect(page.locator("#live-state")).to_contain_text("The camera is off")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#live-state")).to_contain_text("Watching")
    expect(alert).to_be_hidden()
    (other,) = service.live.list()
    assert other.id != session.id
    page.get_by_role("button", name="New video").click()
    wait_for(lambda: not service.live.list())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NotAllowedError", "The browser may not use the camera. Allow it for this page, and try again."),
        ("NotFoundError", "No camera was found."),
        ("NotReadableError", "another program may have it"),
    ],
)
def test_a_camera_that_cannot_be_used(page: Page, service: Service, name: str, words: str) -> None:
    page.evaluate(
        "name => navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', name))", name
    )
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#video-error")).to_contain_text(words)
    assert page.get_by_role("alert").filter(has_text=words).count() == 1
    page.get_by_label("Question", exact=True).fill("What is shown?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("listitem").first.get_by_role("alert")).to_contain_text(words)
    assert service.live.list() == []


def test_a_page_without_cameras_and_a_full_server(page: Page, service: Service, address: str) -> None:
    for _ in range(2):
        httpx2.post(f"{address}/v1/live", json={}, timeout=60)
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#video-error")).to_contain_text("2 live videos are open")
    for session in service.live.list():
        service.live.end(session, "the test has ended")
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#video-error")).to_contain_text("only to pages over https")


def test_with_a_key(browser: Browser, model: xl2jax.Model, tmp_path: Path) -> None:
    """It reaches the WebSocket too."""
    service = make_service(model, tmp_path, limits=LIMITS, api_key=KEY)
    with served(service) as address, opened(browser, address) as page:
        page.get_by_label("API key", exact=True).fill(KEY)
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("banner")).to_contain_text("tiny")
        watch(page)
        (session,) = service.live.list()
        assert session.connections == 1


def test_a_connection_that_is_lost(page: Page, service: Service) -> None:
    """The page connects again by itself, and the live video goes on."""
    page.evaluate(
        """() => {
          window.sockets = [];
          const Plain = WebSocket;
          window.WebSocket = class extends Plain {
            constructor(...all) {
              super(...all);
              sockets.push(this);
            }
          };
        }"""
    )
    watch(page)
    (session,) = service.live.list()
    page.evaluate("sockets[0].close()")
    wait_for(lambda: session.connections == 2)
    expect(page.locator("#live-state")).to_contain_text("Watching")
    expect(page.locator("#video-error")).to_be_hidden()
    page.get_by_role("button", name="New video").click()
    wait_for(lambda: not service.live.list())
