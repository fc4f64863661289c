"""`xl2jax serve` as a process: its flags, signals, and what is left when it is killed."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import wait_for

from xl2jax.commands import serve, service
from xl2jax.testing import write_clip

QUESTION = "What happens?"
KILLS = 20


class Process:
    """A running server."""

    def __init__(self, checkpoint: Path, log: Path, *flags: object):
        command = [
            sys.executable,
            "-m",
            "xl2jax",
            "serve",
            "--checkpoint",
            checkpoint,
            "--port",
            0,
            "--warm-up",
            0,
            *flags,
        ]
        self._log = log
        with open(log, "wb") as err:
            self.process = subprocess.Popen([*map(str, command)], stderr=err)
        wait_for(lambda: self._address() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, log.read_text()
        self.address = self._address()

    def _address(self) -> str:
        found = re.search(r"on (http://\S+)/v1", self._log.read_text())
        return found[1] if found else ""

    def ask(self, video: Path, **options: Any) -> Any:
        return httpx2.post(f"{self.address}/v1/chat/completions", json=body(video, **options), timeout=120)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def body(video: Path, **options: Any) -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": {"url": video.as_uri()}},
        {"type": "text", "text": QUESTION},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}


@pytest.fixture
def start(checkpoint: Path, clip: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def run(*flags: object) -> Process:
        log = tmp_path / f"log{len(running)}"
        running.append(Process(checkpoint, log, "--media-root", clip.parent, "--cache-dir", tmp_path / "kept", *flags))
        return running[-1]

    yield run
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


@pytest.mark.slow
def test_killed_and_terminated(start: Callable[..., Process], clip: Path, tmp_path: Path) -> None:
    """A killed server's file is found again; a terminated one first finishes its answer."""
    first = start()
    answer = first.ask(clip)
    assert answer.status_code == 200, answer.text
    wait_for(lambda: list((tmp_path / "kept" / "videos").glob("*.kv")))
    first.kill()
    second = start()
    again = second.ask(clip)
    assert again.json()["choices"] == answer.json()["choices"]
    assert again.json()["usage"]["video_cached"]
    request = body(clip, stream=True, max_tokens=1000)
    with httpx2.stream("POST", f"{second.address}/v1/chat/completions", json=request, timeout=60) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        second.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    assert second.process.wait(30) == 0
    assert "the server has ended" in (tmp_path / "log1").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments(start: Callable[..., Process], tmp_path: Path) -> None:
    """No finished cache file is lost, and none is broken."""
    clips = [tmp_path / f"{number}.mp4" for number in range(24)]
    for number, clip in enumerate(clips):
        write_clip(clip, 2, fps=8, width=64, height=64 + 2 * number)
    rng, folder = random.Random(0), tmp_path / "kept" / "videos"
    finished: set[Path] = set()
    answers: dict[Path, Any] = {}

    def ask(server: Process, clip: Path) -> None:
        message = server.ask(clip).json()["choices"][0]["message"]
        assert answers.setdefault(clip, message) == message

    for _ in range(KILLS):
        server = start("--media-root", tmp_path)
        assert not list(folder.glob(".*incomplete*"))
        assert finished <= set(folder.glob("*.kv"))
        ask(server, clips[0])  # what follows compiles nothing: the kill comes between watching and writing
        killing = threading.Timer(rng.uniform(0, 1.5), server.process.kill)
        killing.start()
        with contextlib.suppress(httpx2.HTTPError):
            while True:  # until it is killed
                ask(server, rng.choice(clips))
        killing.join()
        server.kill()
        finished |= set(folder.glob("*.kv"))
    server = start("--media-root", tmp_path)
    assert len(finished) > 2
    for clip in answers:
        ask(server, clip)
    assert "warning" not in (tmp_path / f"log{KILLS}").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "give --api-key"),
        (("--api-key", ""), "API key is empty"),
        (("--media-root", "/nowhere"), "no such folder"),
        (("--allow-any-media", "--allow-media-domain", "example.com"), "exclude each other"),
        (("--port", 70000), "port must be"),
        (("--max-queue", 0), "--max-queue must be"),
        (("--max-frames", 2), "--max-frames must be"),
        (("--disk-gib", -1), "--disk-gib"),
        (("--warm-up", 2), "--warm-up must be 0, or from 4"),
        (("--grace-seconds", "nan"), "--grace-seconds must be above 0"),
    ],
)
def test_wrong_flags(refused: Callable[..., str], checkpoint: Path, flags: tuple[object, ...], words: str) -> None:
    assert words in refused(serve.main, "--checkpoint", checkpoint, *flags)


def test_a_taken_port_and_missing_packages(
    refused: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused(serve.main, "--checkpoint", checkpoint, "--port", port)
    monkeypatch.setattr(service, "PACKAGES", ("starlette", "a_package_that_is_missing"))
    assert "pip install 'xl2jax[serve]'" in refused(serve.main, "--checkpoint", checkpoint)


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XL2JAX_API_KEY", "k3y")
    assert serve.check_access(serve.AccessArgs(host="0.0.0.0")) == "k3y"
