"""Live videos of the server from end to end: the bundled checkpoint, the documentation's example, and SIGTERM."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from serving import make_service, served
from test_serve_command import Process
from test_serving_live import LIMITS, ask, feeding, make, png, send, told
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import xl2jax
from xl2jax.commands.demo_clip import demo_questions
from xl2jax.evaluation.scenes import make_scene
from xl2jax.serving.limits import Limits, LiveLimits
from xl2jax.video.image_files import decode_image

ROOT = Path(__file__).parents[1]
SEED, GROUPS = 3, 32

pytestmark = pytest.mark.slow


def test_the_bundled_checkpoint(tmp_path: Path) -> None:
    """Right answers about a scene whose frames come as JPEG files, and those of the library to the same pixels."""
    scene = make_scene(SEED, GROUPS)
    questions = {q.kind: q for q in demo_questions(scene, 1)}
    model = xl2jax.load(ROOT / "checkpoints" / "demo")
    service = make_service(model, tmp_path, limits=Limits(live=LiveLimits()))
    with served(service) as address, model.watch_live() as live:
        about = httpx2.post(f"{address}/v1/live", json={}, timeout=60).json()
        with feeding(address, about) as socket:
            for number in range(scene.frames):
                image = io.BytesIO()
                Image.fromarray(scene.frame(number, 320, 180)).save(image, "JPEG", quality=85)
                socket.send(json.dumps({"seconds": float(number)}))
                socket.send(image.getvalue())
                live.add(float(number), decode_image(image.getvalue()))
                if number % 16 == 15:  # as fast as they are seen: none is dropped
                    told(socket, frames=number + 1)
            for kind in ("time", "colour_of"):
                answer = ask(address, about, questions[kind].text).json()["choices"][0]["message"]["content"]
                assert answer == questions[kind].answer
                assert answer == model.ask(live, questions[kind].text, max_new_tokens=12).text


def test_the_example_of_the_documentation(model: xl2jax.Model, tmp_path: Path) -> None:
    """It runs as it is written, but for the address."""
    text = (ROOT / "docs" / "live.md").read_text()
    section = text[text.index("## On the server") :]
    section = section[: section.index("## What is remembered")]
    with served(make(model, tmp_path, limits=Limits(live=LiveLimits(minutes=30)))) as address:
        section = section.replace("127.0.0.1:8000", address.removeprefix("http://"))
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        (python,) = (block for kind, block in blocks if kind == "python")
        (curl,) = (block for kind, block in blocks if not kind)
        run = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=200, check=False)
        assert run.returncode == 0, run.stderr
        assert "frames=12" in run.stdout
        assert "seconds_seen=11.0" in run.stdout
        run = subprocess.run(["bash", "-euc", curl], capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count('"state":"watching"') == 2


def test_sigterm(checkpoint: Path, tmp_path: Path) -> None:
    """The connection is closed, an answer that runs is finished, and the process ends with status 0."""
    flags = ("--live-minutes", 0.5, "--live-dense-minutes", 0.1, "--live-sessions", 1)
    server = Process(checkpoint, tmp_path / "log", *flags)
    try:
        about = httpx2.post(f"{server.address}/v1/live", json={"fps": 2}, timeout=120).json()
        assert httpx2.post(f"{server.address}/v1/live", json={}, timeout=60).status_code == 429
        socket = connect(server.address.replace("http", "ws") + about["socket"])
        send(socket, range(8))
        told(socket, frames=8)
        part = {"type": "video_url", "video_url": None, "uuid": about["id"]}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        request = {"messages": messages, "stream": True, "max_tokens": 500}
        with httpx2.stream("POST", f"{server.address}/v1/chat/completions", json=request, timeout=60) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as e:
                told(socket, frames=-1)  # it says other things until then
            assert e.value.rcvd is not None
            assert e.value.rcvd.code == 1012
            assert "data: [DONE]" in list(lines)
        assert server.process.wait(30) == 0
    finally:
        server.kill()
    log = (tmp_path / "log").read_text()
    assert "the server has ended" in log
    assert "Traceback" not in log


def test_a_session_under_load(model: xl2jax.Model, tmp_path: Path) -> None:
    """Frames come faster than they can be seen, while questions are asked: the oldest are dropped and counted."""
    with served(make(model, tmp_path, limits=LIMITS)) as address:
        about = httpx2.post(f"{address}/v1/live", json={"fps": 4}, timeout=60).json()
        with feeding(address, about) as socket:
            for number in range(400):
                socket.send(json.dumps({"seconds": number / 4}))
                socket.send(png(number))
                if number in (100, 200, 300):
                    assert ask(address, about).status_code == 200
            while (message := told(socket, received=400))["frames"] + message["dropped"] < 396:
                pass
            assert message["frames"] + message["dropped"] <= 404  # a group at a gap repeats frames
            assert 95 < message["seconds"] < 100
