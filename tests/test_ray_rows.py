"""Files of rows, their division into parts, and the folder of answers. None of this needs Ray."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import xl2jax
from xl2jax.commands import ray_batch, ray_serve
from xl2jax.errors import UserError
from xl2jax.ray import batch
from xl2jax.ray.cluster import room_for
from xl2jax.ray.output import Answered, Done, Journal, collect_journals, journal_of, locked, open_journal, write_rows
from xl2jax.ray.questions import MOST_TRIES, Fault, Settings, answer_rows
from xl2jax.ray.rows import Columns, Part, Row, divide, open_rows, read_part
from xl2jax.testing import write_clip

SAMPLING = xl2jax.FrameSampling(fps=2, max_frames=16)
SETTINGS = Settings("", sampling=SAMPLING, max_new_tokens=4)


def rows_of(videos: str) -> list[dict[str, Any]]:
    """A row for each letter, which names its video."""
    return [{"video": f"{v}.mp4", "question": f"What is {n}?", "key": n} for n, v in enumerate(videos)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # empty lines are no rows
    return path


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_parts_hold_every_row_once_and_whole_videos(tmp_path: Path, name: str) -> None:
    videos = "aabbbccddddddeffg"
    file = open_rows(write(tmp_path / name, rows_of(videos)), Columns(id="key"))
    parts = list(divide(file.rows(), 3))
    read = [list(read_part(file, part)) for part in parts]
    assert [row.number for rows in read for row in rows] == list(range(len(videos)))
    assert [(row.video, row.id) for rows in read for row in rows] == [
        (f"{v}.mp4", str(n)) for n, v in enumerate(videos)
    ]
    assert ["".join((row.video or "")[0] for row in rows) for rows in read] == ["aabbb", "ccdddddd", "eff", "g"]


def test_a_video_with_very_many_rows_is_divided(tmp_path: Path) -> None:
    file = open_rows(write(tmp_path / "in.jsonl", rows_of("a" * 50)), Columns())
    assert [(part.first, part.last) for part in divide(file.rows(), 3)] == [(0, 23), (24, 47), (48, 49)]


def test_rows_that_cannot_be_asked_have_a_problem(tmp_path: Path) -> None:
    good = json.dumps(rows_of("a")[0])
    lines = [good, "nonsense", "[1]", '{"video": 1, "question": "?"}', '{"video": "a.mp4", "question": " "}', good]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    problems = [row.problem for _, row in open_rows(tmp_path / "in.jsonl", Columns()).rows()]
    assert problems[0] is problems[5] is None
    assert [problem.partition(":")[0].partition(" (")[0] for problem in problems[1:5] if problem] == [
        "not JSON", "the row is not an object with columns", "video", "question",
    ]  # fmt: skip


def answered(numbers: range, videos: str = "abcdefgh") -> list[Answered]:
    rows = rows_of(videos)
    return [
        Answered(row=n, video=rows[n]["video"], question=rows[n]["question"], id=str(n), answer=f"it is {n}")
        for n in numbers
    ]


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    """Complete files, and the journal of a part whose actor was killed in the middle of a line."""
    file = open_rows(write(tmp_path / "in.jsonl", rows_of("abcdefgh")), Columns(id="key"))
    folder = tmp_path / "out"
    with locked(folder):
        write_rows(folder, answered(range(2, 4)))
        part = Part(5, 7, 0)
        with open_journal(folder, part) as journal:
            journal.begin(5)
            journal.add(answered(range(5, 6)))
            journal.begin(6)
        with open(journal_of(folder, part), "ab") as f:
            f.write(b'{"rows": [{"row": 6,')
        collect_journals(folder)
        left = [row.number for _, row in Done(folder).left(file.rows(), tmp_path / "in.jsonl")]
    assert left == [0, 1, 4, 6, 7]
    table = pq.read_table(folder)
    assert sorted(zip(table["row"].to_pylist(), table["answer"].to_pylist(), strict=True)) == [
        (n, f"it is {n}") for n in (2, 3, 5)
    ]


def test_another_input_is_refused(tmp_path: Path) -> None:
    folder, source = tmp_path / "out", tmp_path / "in.jsonl"
    with locked(folder):
        write_rows(folder, answered(range(2, 4)))
        for videos, words in (("abcXefgh", "answers other rows"), ("abc", "has no row 3")):
            file = open_rows(write(source, rows_of(videos)), Columns(id="key"))
            with pytest.raises(UserError, match=words):
                list(Done(folder).left(file.rows(), source))
        with pytest.raises(UserError, match="another run"), locked(folder):
            pass
        write_rows(folder, answered(range(3, 5)))
        with pytest.raises(UserError, match="row 3 was answered twice"):
            Done(folder)


def test_a_journal_that_is_being_written_is_not_collected(tmp_path: Path) -> None:
    with locked(tmp_path), open_journal(tmp_path, Part(0, 3, 0)), pytest.raises(UserError, match="still writing"):
        collect_journals(tmp_path)


def asked(numbers: range, video: str = "a.mp4") -> list[Row]:
    return [Row(n, video, f"What is {n}?", None) for n in numbers]


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    with locked(tmp_path), open_journal(tmp_path, Part(0, 9, 0)) as opened:
        yield opened


@pytest.mark.slow
def test_answers_are_those_of_the_library(model: xl2jax.Model, tmp_path: Path, journal: Journal) -> None:
    write_clip(tmp_path / "a.mp4", 5, fps=8, width=64, height=64)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    rows = [*asked(range(3)), *asked(range(3, 5), "b.mp4"), Row(5, None, "?", None, "video: is empty or no text")]
    rows[1] = Row(1, "a.mp4", "much " * 200_000, None)  # too long for the model
    answer_rows(model, rows, tmp_path, SETTINGS, journal)
    with model.watch(tmp_path / "a.mp4", SAMPLING) as video:
        texts = [model.ask(video, f"What is {n}?", max_new_tokens=4).text for n in (0, 2)]
    assert [journal.rows[n].answer for n in (0, 2)] == texts
    assert [row.row for row in journal.rows] == list(range(6))
    assert [row.error is None for row in journal.rows] == [True, False, True, False, False, False]
    assert "b.mp4" in (journal.rows[3].error or "")
    assert journal.rows[5].error == "video: is empty or no text"


class Broken:
    """A model at which the process fails for a certain video, and counts how often it watched."""

    def __init__(self) -> None:
        self.watched: list[str] = []

    def watch(self, path: Path, *_: object, **__: object) -> object:
        self.watched.append(path.name)
        if path.name == "a.mp4":
            raise TypeError("a fault of the program")
        raise UserError("not a video")


def test_a_video_at_which_actors_die_is_given_up(tmp_path: Path) -> None:
    """Each fault ends its process: a new one opens the journal."""
    model, rows = Broken(), [*asked(range(1), "b.mp4"), *asked(range(1, 3)), *asked(range(3, 4), "c.mp4")]
    faults = 0
    with locked(tmp_path):
        for _ in range(MOST_TRIES + 1):
            with open_journal(tmp_path, Part(0, 3, 0)) as journal:
                try:
                    answer_rows(model, rows, tmp_path, SETTINGS, journal)  # type: ignore[arg-type]
                except Fault:
                    faults += 1
    assert faults == MOST_TRIES
    assert model.watched == ["b.mp4", *["a.mp4"] * MOST_TRIES, "c.mp4"]
    assert [row.row for row in journal.rows] == [0, 1, 2, 3]
    assert journal.rows[1].error == "given up after 3 tries: TypeError: a fault of the program"
    assert journal.rows[3].error == "not a video"


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (None, (), "in.jsonl: no such file"),
        ("", (), "has no row"),
        ("\n\n", (), "has no row"),
        ("nonsense\n", (), "row 0: not JSON"),
        (
            '{"path": "a.mp4", "question": "?"}\n',
            (),
            "no column 'video', but path, question: name it with --video-column",
        ),
        ('{"video": "a.mp4", "question": "?"}\n', ("--id-column", "key"), "no column 'key'"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--num-gpus", "1.5"), "--num-gpus must be"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--num-gpus", "0", "--num-cpus", "0"), "are both 0"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--num-gpus", "2"), "--num-gpus 2 with --tensor 1"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--num-gpus", "0.5", "--tensor", "2"), "--num-gpus 0.5 with"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--tensor", "0"), "--tensor must be"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--tensor", "1009"), "--tensor 1009 does not divide"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--actors", "0"), "--actors"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--rows-per-file", "0"), "--rows-per-file"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--root", "/nowhere"), "--root /nowhere: no such folder"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--checkpoint", "nowhere"), "no such checkpoint"),
        ('{"video": "a.mp4", "question": "?"}\n', ("--pool", "500"), "pool must be"),
    ],
)
def test_wrong_input(
    refused: Callable[..., str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    flags: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr("xl2jax.ray.batch.require_ray", lambda: None)
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    given = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out", "--checkpoint", checkpoint)
    assert words in refused(ray_batch.main, *given, *flags)


def test_an_unreadable_parquet_file(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xl2jax.ray.batch.require_ray", lambda: None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1" + bytes(100))
    assert "not a Parquet file" in refused(ray_batch.main, "-i", tmp_path / "in.parquet", "-o", tmp_path / "out")


def test_a_folder_of_other_settings_is_refused(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xl2jax.ray.batch.require_ray", lambda: None)
    monkeypatch.setattr("xl2jax.ray.batch.divide", lambda *_: [])  # nothing to do
    source = write(tmp_path / "in.jsonl", rows_of("a"))
    given = ("-i", source, "-o", tmp_path / "out", "--checkpoint", checkpoint)
    monkeypatch.setattr("sys.argv", ["command", *map(str, given)])
    assert ray_batch.main() == 0
    assert "max_new_tokens 128, not 5" in refused(ray_batch.main, *given, "--max-new-tokens", 5)


def test_an_actor_has_the_gpus_that_its_model_is_split_over(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads the model on all of them, and a folder goes on with another number."""
    asked: list[tuple[float, int]] = []

    def run(work: Any, parts: list[Part], actors: int, num_gpus: float, num_cpus: float) -> Iterator[dict[str, Any]]:
        monkeypatch.setattr("xl2jax.load", lambda _, tensor, **load: asked.append((num_gpus, tensor)))
        batch._Actor(work)
        return iter(())

    monkeypatch.setattr("xl2jax.ray.batch.require_ray", lambda: None)
    monkeypatch.setattr("xl2jax.ray.batch.cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("xl2jax.ray.batch.room_for", lambda *_: 1)
    monkeypatch.setattr("xl2jax.ray.batch._run", run)
    monkeypatch.setattr("xl2jax.system.backend.start_backend", lambda: None)
    source = write(tmp_path / "in.jsonl", rows_of("a"))
    given = ("ray-batch", "-i", source, "-o", tmp_path / "out", "--checkpoint", checkpoint)
    for flags in ((), ("--tensor", 2), ("--tensor", 2, "--num-gpus", 0)):
        monkeypatch.setattr("sys.argv", [*map(str, (*given, *flags))])
        assert ray_batch.main() == 0
    assert asked == [(1, 1), (2, 2), (0, 2)]


def test_a_replica_has_the_gpus_that_its_model_is_split_over(
    refused: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xl2jax.ray.cluster.require_ray", lambda: None)
    assert "--num-gpus 1 with --tensor 2" in refused(ray_serve.main, "--tensor", 2, "--num-gpus", 1)
    assert "does not divide" in refused(ray_serve.main, "--tensor", 1009, "--checkpoint", checkpoint)


@pytest.mark.parametrize("main", [ray_batch.main, ray_serve.main])
def test_ray_that_is_not_installed(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[], int]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ("-i", tmp_path / "in", "-o", tmp_path / "out") if main is ray_batch.main else ()
    assert "pip install 'xl2jax[ray]'" in refused(main, *flags)


@pytest.mark.parametrize(
    ("count", "gpus", "cpus", "room"),
    [(None, 2, 1, 5), (3, 2, 1, 3), (None, 0.5, 0, 22), (None, 0, 4, 6), (5, 4, 1, None)],
)
def test_what_a_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch, count: int | None, gpus: float, cpus: float, room: int | None
) -> None:
    """An actor is on one node: what is left over on several nodes is no room."""
    nodes = [
        {"Alive": True, "Resources": {"GPU": 8.0, "CPU": 16.0}},
        {"Alive": True, "Resources": {"GPU": 3.0, "CPU": 8.0}},
    ]
    nodes += [{"Alive": False, "Resources": {"GPU": 64.0}}, {"Alive": True, "Resources": {"CPU": 3.0}}]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes))
    if room is None:
        with pytest.raises(UserError, match="no room for 5 actors of 4 GPUs and 1 CPUs each: .* 11 GPUs .* room for 2"):
            room_for(count, gpus, cpus, "actors")
    else:
        assert room_for(count, gpus, cpus, "actors") == room


def test_a_cluster_that_is_not_there(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xl2jax.ray.batch.require_ray", lambda: None)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    source = write(tmp_path / "in.jsonl", rows_of("a"))
    flags = ("-i", source, "-o", tmp_path / "out", "--checkpoint", checkpoint, "--address", "127.0.0.1:1")
    assert refused(ray_batch.main, *flags) == "Ray cannot be reached at 127.0.0.1:1 (Connection refused)"


def test_several_replicas_share_a_folder(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xl2jax.ray.cluster.require_ray", lambda: None)
    assert "--cache-dir" in refused(ray_serve.main, "--replicas", 2)


def test_the_package_needs_no_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; import xl2jax.ray, xl2jax.commands.ray_batch, xl2jax.commands.ray_serve"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
