"""Runs of `xl2jax eval` with an engine that answers at once, and data sets for them.

As a script it makes one run, is killed and goes on, again and again:
python benchmark_runs.py DATA OUT KILLS
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import xl2jax
from xl2jax.benchmarks import checkpoint_identity, engine, lmms_files, report, runner, tasks  # noqa: F401 (before processes are forked)
from xl2jax.benchmarks.engine import Ask, Reply
from xl2jax.benchmarks.settings import View
from xl2jax.benchmarks.videomme import DOMAINS, DURATIONS, SUB_CATEGORIES, TASK_TYPES
from xl2jax.commands import evaluate
from xl2jax.errors import UserError
from xl2jax.system import backend

TASKS = "videomme,longvideobench_val_v"


def videomme_row(number: int, questions: int = 4) -> dict[str, Any]:
    video = number // questions
    return {
        "videoID": f"vid{video}",
        "duration": DURATIONS[video % 3],
        "domain": DOMAINS[video % 6],
        "sub_category": SUB_CATEGORIES[video % 30],
        "task_type": TASK_TYPES[number % 12],
        "question_id": f"{video}-{number % questions}",
        "question": f"What happens at 00:{number % 60:02d}, in case {number}?",
        "options": [f"{letter}. thing {letter}" for letter in "ABCD"],
        "answer": "ABCD"[number % 4],
    }


def longvideobench_row(number: int) -> dict[str, Any]:
    row = {f"option{i}": f"thing {i}" for i in range(4)} | {"option4": "N/A"}
    return row | {
        "id": f"lvb_{number}",
        "video_path": f"lvb{number // 2}.mp4",
        "question": f"What comes {number}th?",
        "correct_choice": number % 4,
        "duration_group": (15, 60, 600, 3600)[number % 4],
        "question_category": ("E2O", "T3E", "SAA")[number % 3],
    }


def write_data(folder: Path, videomme: int = 120, longvideobench: int = 80) -> Path:
    """Rows as JSON, and files that stand for videos."""
    tables = {
        "videomme/videomme.json": [videomme_row(n) for n in range(videomme)],
        "longvideobench/lvb_val.json": [longvideobench_row(n) for n in range(longvideobench)],
    }
    for name, rows in tables.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
        (file.parent / "videos").mkdir(exist_ok=True)
        for row in rows:
            (file.parent / "videos" / row.get("video_path", f"{row.get('videoID')}.mp4")).write_bytes(b"video")
    return folder


class StubVideo:
    frames = 8

    def __init__(self, path: Path, seconds: float):
        self.path, self._seconds = path, seconds

    def ask(self, question: Ask) -> Reply:
        time.sleep(self._seconds)
        if "refused" in question.prompt:
            raise UserError("the question is refused")
        number = int(hashlib.sha256(f"{self.path.name} {question.prompt}".encode()).hexdigest(), 16)
        text = ("A", "(B)", "The answer is C.", "D", "nothing that counts", "")[number % 6]
        return Reply(text, 100, 2, dense=True)

    def close(self) -> None:
        pass


class StubOpened:
    duration, fps, frame_count, chosen_frames, damaged_frames = 40.0, 25.0, 1000, 8, 0

    def __init__(self, engine: StubEngine, path: Path):
        self._engine, self.path = engine, path

    def batches(self) -> Iterator[np.ndarray]:
        yield np.zeros((4, 2, 2, 3), np.uint8)
        if self.path.read_bytes() == b"torn":
            raise UserError(f"{self.path}: is torn")
        yield np.ones((4, 2, 2, 3), np.uint8)

    def watch(self, batches: Iterator[np.ndarray]) -> StubVideo:
        assert [int(batch[0, 0, 0, 0]) for batch in batches] == [0, 1]
        self._engine.watched.append(self.path.name)
        return StubVideo(self.path, self._engine.seconds)


class StubEngine:
    """Counts what is watched. A file `broken` cannot be opened, and one `torn` ends in an error."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.opened: list[tuple[str, View]] = []
        self.watched: list[str] = []

    def open(self, path: Path, view: View) -> StubOpened:
        self.opened.append((path.name, view))
        if path.read_bytes() == b"broken":
            raise UserError(f"{path}: cannot be read")
        return StubOpened(self, path)


def stub_model(fingerprint: str = "abc") -> Any:
    return SimpleNamespace(
        fingerprint=fingerprint, dtype="float32", config=SimpleNamespace(llm=SimpleNamespace(weights=None))
    )


def main(data: Path, out: Path, kills: int) -> None:
    """Runs in processes that are killed after a random time, and at last in one that is not."""
    patches: dict[tuple[Any, str], Any] = {
        (engine, "ModelEngine"): lambda model: StubEngine(0.002),
        (xl2jax, "load_copies"): lambda *args, **options: [stub_model()],
        (checkpoint_identity, "files_identity"): lambda checkpoint: "files",
        (backend, "start_backend"): lambda: None,
        (report, "plot"): lambda *args: None,
    }
    for (module, name), value in patches.items():
        setattr(module, name, value)
    sys.argv = ["xl2jax eval", "--task", TASKS, "--data", str(data), "--output", str(out), "--checkpoint", "stub"]
    rng, answers, lengths = random.Random(7), out / "answers-0-of-1.jsonl", [0]
    for _ in range(kills):
        child = os.fork()
        if not child:
            evaluate.main()
            os._exit(0)
        # It is killed while it answers: no sooner than it has written a line more.
        end = time.monotonic() + 60
        while time.monotonic() < end and (not answers.exists() or answers.stat().st_size <= lengths[-1]):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "a run ended before it was killed"
        with contextlib.suppress(OSError), open(answers, "ab") as torn:
            torn.write(b'{"task": "videomme", "doc')  # what a kill in the middle of a write leaves
        lengths.append(answers.stat().st_size)
    assert lengths == sorted(lengths), lengths
    evaluate.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
