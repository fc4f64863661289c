"""A real Ray on this machine: actors that are killed, replicas that keep their videos, and what is left in the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pyarrow.parquet as pq
import pytest
from serving import wait_for

import xl2jax
from xl2jax.testing import write_clip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'xl2jax[ray]'"
    ),
]

FRAMES = {"fps": 2, "max_frames": 16}
VIDEOS, QUESTIONS = 6, 2


class Process:
    """A command on two CPUs, with a Ray of its own, whose files lie in a folder with a short name."""

    def __init__(self, log: Path, folder: str, *command: object):
        self._log, self.seen = log, set[psutil.Process]()
        environment = os.environ | {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",  # no token in the home folder
            "RAY_OVERRIDE_RESOURCES": "",
            "JAX_PLATFORMS": "cpu",
        }
        environment.pop("RAY_ADDRESS", None)
        with open(log, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xl2jax", *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def look(self) -> set[psutil.Process]:
        """The processes below it, which `left` remembers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.seen

    def end(self) -> tuple[int, str]:
        """Waits for its end: status and stdout."""
        out, _ = self.process.communicate(timeout=120)
        return self.process.returncode, out.decode()

    def left(self) -> list[psutil.Process]:
        """Processes that outlive it."""
        _, alive = psutil.wait_procs(self.seen, timeout=20)
        return alive


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    running: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="xr", dir="/tmp", ignore_cleanup_errors=True) as folder:

        def run(*command: object) -> Process:
            running.append(Process(tmp_path / f"log{len(running)}", folder, *command))
            return running[-1]

        yield run
        for process in running:
            for child in process.look():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.process.kill()
            process.process.communicate()


def holder(process: Process, file: Path) -> psutil.Process | None:
    """The process that has a file open."""
    for child in process.look():
        with contextlib.suppress(psutil.Error):
            if any(opened.path == str(file) for opened in child.open_files()):
                return child
    return None


def test_a_killed_actor_loses_no_row(start: Any, checkpoint: Path, model: xl2jax.Model, tmp_path: Path) -> None:
    """It dies in the middle of its part, of which each actor has one. One of its videos cannot be read."""
    rows = []
    for number in range(2 * VIDEOS):
        write_clip(tmp_path / f"{number}.mp4", 5, fps=8, width=64, height=64 + 2 * number)
        rows += [
            {"video": f"{number}.mp4", "question": f"What is {n}?", "key": f"{number}-{n}"} for n in range(QUESTIONS)
        ]
    (tmp_path / "0.mp4").write_bytes(b"no video")
    with model.watch(tmp_path / "1.mp4", xl2jax.FrameSampling(**FRAMES)) as video:
        asked = [(video, f"What is {n}?") for n in range(QUESTIONS)]
        texts = [answer.text for answer in model.ask_many(asked, max_new_tokens=4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, half = tmp_path / "out", VIDEOS * QUESTIONS
    command = ("ray-batch", "-i", tmp_path / "in.jsonl", "-o", out, "--checkpoint", checkpoint, "--id-column", "key",
               "--num-gpus", 0, "--actors", 2, "--rows-per-file", half, "--fps", 2, "--max-frames", 16,
               "--max-new-tokens", 4, "--json")  # fmt: skip
    run = start(*command)
    journal = out / f".rows-{0:012d}-{half - 1:012d}.jsonl"
    wait_for(lambda: run.process.poll() is not None or (journal.exists() and b'"answer"' in journal.read_bytes()), 120)
    actor = holder(run, journal)
    assert actor is not None, run.log
    kept = journal.read_bytes()
    actor.kill()
    status, printed = run.end()
    assert status == 0, run.log
    assert json.loads(printed) == {"before": 0, "answered": len(rows), "errors": QUESTIONS}
    assert kept.count(b'"begin"') < VIDEOS  # it was in the middle
    assert run.left() == []
    table = pq.read_table(out).sort_by("row").to_pylist()
    assert [(row["row"], row["id"], row["question"]) for row in table] == [
        (n, row["key"], row["question"]) for n, row in enumerate(rows)
    ]
    assert all("not a video" in row["error"] and row["answer"] is None for row in table[:QUESTIONS])
    assert all(row["error"] is None and row["finish_reason"] for row in table[QUESTIONS:])
    assert [row["answer"] for row in table[QUESTIONS : 2 * QUESTIONS]] == texts
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == [".lock"]

    again = start(*command)
    status, printed = again.end()
    assert (status, json.loads(printed)) == (0, {"before": len(rows), "answered": 0, "errors": 0}), again.log


def test_replicas_keep_their_videos(start: Any, checkpoint: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for name in "abc":
        write_clip(media / f"{name}.mp4", 5, fps=8, width=64, height=64 + 2 * ord(name) % 64)
    run = start(
        "ray-serve", "--checkpoint", checkpoint, "--replicas", 2, "--num-gpus", 0, "--num-cpus", 0.5, "--port", 0,
        "--warm-up", 0, "--cache-dir", tmp_path / "kept", "--media-root", media, "--grace-seconds", 30,
        "--max-body-mib", 1,
    )  # fmt: skip
    wait_for(lambda: run.process.poll() is not None or "serving on" in run.log, 120)
    run.look()
    found = re.search(r"serving on (\S+)/v1", run.log)
    assert found, run.log
    with httpx2.Client(base_url=found[1], timeout=120) as http:

        def ask(part: dict[str, Any], **options: Any) -> Any:
            content = [part, {"type": "text", "text": "What happens?"}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "xl2jax": FRAMES, **options}
            return http.post("/v1/chat/completions", json=body)

        def file(name: str) -> dict[str, Any]:
            return {"type": "video_url", "video_url": {"url": (media / f"{name}.mp4").as_uri()}}

        for name in "abc":
            first, second, third = (ask(file(name)) for _ in range(3))
            assert first.status_code == second.status_code == 200, first.text
            assert [r.json()["usage"]["video_cached"] for r in (first, second, third)] == [False, True, True]
            assert len({r.headers["x-replica"] for r in (first, second, third)}) == 1
        # A name of the client's is a session of its own, with which the address may be left out.
        named = [ask(file("a") | {"uuid": f"video {n}"}).headers["x-replica"] for n in range(12)]
        assert len(set(named)) == 2
        for n, replica in enumerate(named):
            later = ask({"type": "video_url", "video_url": None, "uuid": f"video {n}"})
            assert (later.status_code, later.headers["x-replica"]) == (200, replica)
        # Uploads lie in the shared folder: whichever replica has got one, another may be asked about it.
        data = (media / "b.mp4").read_bytes()
        for _ in range(3):
            stored = http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("b.mp4", data)}).json()
            assert ask({"type": "file", "file": {"file_id": stored["id"]}}).status_code == 200
            assert http.get(f"/v1/files/{stored['id']}/content").content == data
            http.delete(f"/v1/files/{stored['id']}")
        assert ask(file("nothing")).json()["error"]["code"] == "media_refused"
        assert http.post("/v1/chat/completions", json={"messages": ["x" * 2_000_000]}).status_code == 413
        assert http.get("/health", headers={"Host": "elsewhere.example"}).status_code == 403
        assert http.get("/ready").status_code == 200
        # What runs when the signal comes is finished.
        body = {
            "messages": [{"role": "user", "content": [file("c"), {"type": "text", "text": "?"}]}],
            "max_tokens": 200,
        }
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True, "xl2jax": FRAMES}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            run.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert run.end()[0] == 0, run.log
    assert run.left() == []
