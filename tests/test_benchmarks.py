"""`xl2jax eval`: runs that go on, shards, what cannot be watched, and the files of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from benchmark_runs import (
    TASKS,
    StubEngine,
    StubOpened,
    StubVideo,
    longvideobench_row,
    stub_model,
    videomme_row,
    write_data,
)
from PIL import Image

import xl2jax
from xl2jax.benchmarks import checkpoint_identity, engine, report
from xl2jax.benchmarks.dataset import DataFolder
from xl2jax.benchmarks.engine import Ask, Reply
from xl2jax.benchmarks.lmms_files import results_object, sample_lines, total_seconds
from xl2jax.benchmarks.records import Record, RunInfo, open_log
from xl2jax.benchmarks.results import read_results, score
from xl2jax.benchmarks.runner import collect
from xl2jax.benchmarks.statistics import clustered_error, mcnemar, standard_error, wilson
from xl2jax.benchmarks.tasks import TASKS as ALL_TASKS
from xl2jax.benchmarks.tasks import find_task
from xl2jax.commands import evaluate
from xl2jax.errors import UserError
from xl2jax.system import backend

type Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubEngine:
    made = StubEngine()
    monkeypatch.setattr(engine, "ModelEngine", lambda model: made)
    monkeypatch.setattr(xl2jax, "load_copies", lambda *args, **options: [stub_model()])
    monkeypatch.setattr(checkpoint_identity, "files_identity", lambda checkpoint: "files")
    monkeypatch.setattr(backend, "start_backend", lambda: None)
    monkeypatch.setattr(report, "plot", lambda *args: None)  # drawing takes longer than all the rest
    return made


def flags(data: Path, out: Path, *further: object, task: str = TASKS) -> tuple[object, ...]:
    return ("--task", task, "--data", data, "-o", out, "--checkpoint", "stub", *further)


def lasting(page: Path) -> str:
    """A report without what depends on the clock."""
    return page.read_text().partition("## Time")[0]


def samples(out: Path) -> dict[str, list[str]]:
    files = sorted(out.glob("stub/*_samples_*.jsonl"))
    return {file.stem.partition("_samples_")[2]: file.read_text().splitlines() for file in files}


def test_a_run_that_is_killed_ten_times_gives_the_same_report(
    command: Command, stub: StubEngine, data: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("benchmark_runs.py")
    run = [sys.executable, "-W", "ignore", str(script), str(data), str(tmp_path / "killed"), "10"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert command(evaluate.main, *flags(data, tmp_path / "whole"))[0] == 0
    assert lasting(tmp_path / "killed" / "report.md") == lasting(tmp_path / "whole" / "report.md")
    assert samples(tmp_path / "killed") == samples(tmp_path / "whole")
    lines = (tmp_path / "killed" / "answers-0-of-1.jsonl").read_text().splitlines()
    assert len(lines) == 200  # no question was asked twice
    assert len({(row["task"], row["doc_id"]) for row in map(json.loads, lines)}) == 200


def test_shards_are_merged(
    command: Command, refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path
) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    status, out, _ = command(evaluate.main, *flags(data, whole, "--json"))
    assert status == 0
    assert [(row["task"], row["answered"]) for row in json.loads(out)["tasks"]] == [
        ("videomme", 120), ("longvideobench_val_v", 80),
    ]  # fmt: skip
    # Each video is watched once, whatever the number of its questions.
    assert len(stub.watched) == len(set(stub.watched)) == 30 + 40
    stub.watched.clear()
    for folder, shard in ((shared, "0/3"), (shared, "1/3"), (tmp_path / "other host", "2/3")):
        if shard == "2/3":
            assert "have not been asked yet" in refused(evaluate.main, "merge", shared)
        assert command(evaluate.main, *flags(data, folder, "--shard", shard))[0] == 0
    assert len(stub.watched) == len(set(stub.watched)) == 30 + 40
    merged = tmp_path / "merged"
    folders = (shared, tmp_path / "other host")
    assert "--output" in refused(evaluate.main, "merge", *folders)
    assert command(evaluate.main, "merge", *folders, "-o", merged)[0] == 0
    assert lasting(merged / "report.md") == lasting(whole / "report.md")
    assert samples(merged) == samples(whole)
    # The merged folder is a run like any other, and a finished run asks nothing again.
    stub.watched.clear()
    assert command(evaluate.main, *flags(data, merged))[0] == 0
    assert stub.watched == []


def test_other_settings_are_not_mixed(
    command: Command, refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    assert command(evaluate.main, *flags(data, a, "--shard", "0/2"))[0] == 0
    assert "setting" in refused(evaluate.main, *flags(data, a, "--setting", "chunked"))
    assert "limit: null, not 7" in refused(evaluate.main, *flags(data, a, "--limit", 7))
    assert "variant" in refused(evaluate.main, *flags(data, a, "--variant", "lmms-eval"))
    assert command(evaluate.main, *flags(data, b, "--shard", "1/2", "--setting", "chunked"))[0] == 0
    assert "different settings (setting" in refused(evaluate.main, "merge", a, b, "-o", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(xl2jax, "load_copies", lambda *args, **options: [stub_model("another")])
    assert command(evaluate.main, *flags(data, c, "--shard", "1/2"))[0] == 0
    assert 'fingerprint: "abc", not "another"' in refused(evaluate.main, "merge", a, c, "-o", tmp_path / "m")
    assert "fingerprint" in refused(evaluate.main, *flags(data, a, "--shard", "1/2"))
    (c / "run.json").unlink()
    assert "run.json, which says to what, is missing" in refused(evaluate.main, *flags(data, c, "--shard", "1/2"))
    other = write_data(tmp_path / "other data", videomme=121)
    assert "tasks" in refused(evaluate.main, *flags(other, a, "--shard", "0/2"))


def test_a_finished_run_is_not_taken_for_another(
    command: Command, refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nothing is loaded for the same checkpoint; other settings and a replaced checkpoint leave the report as it is."""
    out, loaded = tmp_path / "out", []
    given = flags(data, out, "--limit", 4, task="videomme")
    assert command(evaluate.main, *given)[0] == 0
    (out / "report.md").write_text("the report")
    for further, words in (
        (("--dtype", "float16", "--weights", "int4"), 'dtype: null, not "float16"'),
        (("--weights", "int4"), 'weights: null, not "int4"'),
    ):
        assert words in refused(evaluate.main, *given, *further)
    monkeypatch.setattr(xl2jax, "load_copies", lambda *args, **options: [stub_model("another")])
    monkeypatch.setattr(checkpoint_identity, "files_identity", lambda checkpoint: "other files")
    assert 'fingerprint: "abc", not "another"' in refused(evaluate.main, *given)
    assert (out / "report.md").read_text() == "the report"
    # The same parameters in other files are the same checkpoint.
    monkeypatch.setattr(xl2jax, "load_copies", lambda *args, **options: loaded.append(args) or [stub_model()])
    assert command(evaluate.main, *given)[0] == 0
    assert len(loaded) == 1
    monkeypatch.setattr(checkpoint_identity, "files_identity", lambda checkpoint: "files")
    assert command(evaluate.main, *given)[0] == 0
    assert len(loaded) == 1
    assert stub.watched == ["vid0.mp4"]


def test_the_identity_of_a_checkpoint(checkpoint: Path, copied: Path) -> None:
    """It is that of a copy, and changes with the weights, the config and the tokenizer."""
    identities = [checkpoint_identity.files_identity(str(checkpoint))]
    assert checkpoint_identity.files_identity(str(copied)) == identities[0]
    for name, change in (
        ("model.safetensors", lambda b: b[:-64] + bytes(64)),
        ("config.json", lambda b: b.replace(b'"rope_theta": ', b'"rope_theta": 1')),
        ("tokenizer.json", lambda b: b.replace(b'"add_prefix_space": false', b'"add_prefix_space": true')),
    ):
        file = copied / name
        changed = change(file.read_bytes())
        assert changed != file.read_bytes()
        file.write_bytes(changed)
        identities.append(checkpoint_identity.files_identity(str(copied)))
    assert len(set(identities)) == 4
    with pytest.raises(UserError, match="no such checkpoint folder"):
        checkpoint_identity.files_identity("/nowhere")


def test_another_number_of_shards_is_refused(
    command: Command, refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path
) -> None:
    """Their files do not hold the answers that the others gave."""
    assert command(evaluate.main, *flags(data, tmp_path / "out", "--shard", "0/2"))[0] == 0
    stub.watched.clear()
    for shard in ("0/3", "0/1"):
        assert "shards i/2, not i/" in refused(evaluate.main, *flags(data, tmp_path / "out", "--shard", shard))
    assert stub.watched == []
    assert not (tmp_path / "out" / "answers-0-of-3.jsonl").exists()


def test_hosts_divide_videos_alike(tmp_path: Path) -> None:
    """Also a host that lacks a video which two names stand for."""
    names = ("3_ego/a.mp4", "a.mp4", "b.mp4")
    rows = [{"video_name": name, "question": "?", "answer": "A", "task_type": "ego"} for name in names]
    task = find_task("mlvu", "upstream")
    divided = []
    for host in ("with", "without"):
        folder = tmp_path / host / "mlvu"
        (folder / "3_ego").mkdir(parents=True)
        (folder / "mlvu.json").write_text(json.dumps(rows))
        if host == "with":
            (folder / "3_ego" / "a.mp4").write_bytes(b"video")
        groups = collect(DataFolder(tmp_path / host), [task], {"mlvu": None}, None)  # type: ignore[dict-item]
        divided.append([(group.name, [q.doc_id for q in group.questions]) for group in groups])
    assert divided[0] == divided[1]


def test_missing_subtitles_are_said(
    command: Command, refused: Callable[..., str], stub: StubEngine, tmp_path: Path
) -> None:
    data, out = write_data(tmp_path / "data", videomme=12, longvideobench=2), tmp_path / "out"
    given = flags(data, out, task="videomme,videomme_w_subtitle")
    assert "videomme_w_subtitle puts subtitles into its prompts, and no question" in refused(evaluate.main, *given)
    assert not out.exists()
    (data / "videomme" / "vid1.srt").write_text("")
    status, _, err = command(evaluate.main, *given)
    assert status == 0
    assert "warning: videomme_w_subtitle: 8 of 12 questions without subtitles" in err
    assert (out / "report.md").read_text().count("8 of 12 questions without subtitles") == 1
    # Prompts with and without them are not mixed.
    (data / "videomme" / "vid2.srt").write_text("")
    assert "tasks.videomme_w_subtitle.without_subtitles: 8, not 4" in refused(evaluate.main, *given)
    (data / "videomme" / "vid0.srt").write_text("")
    status, _, err = command(evaluate.main, *flags(data, tmp_path / "all", task="videomme_w_subtitle"))
    assert (status, "without subtitles" in err) == (0, False)
    assert "without subtitles" not in (tmp_path / "all" / "report.md").read_text()


def test_videos_that_are_missing_or_unreadable(
    command: Command, refused: Callable[..., str], stub: StubEngine, tmp_path: Path
) -> None:
    data, out = write_data(tmp_path / "data", videomme=20, longvideobench=2), tmp_path / "out"
    videos = data / "videomme" / "videos"
    (videos / "vid1.mp4").unlink()
    (videos / "vid2.mp4").write_bytes(b"broken")
    (videos / "vid3.mp4").write_bytes(b"torn")
    rows = [videomme_row(n) for n in range(20)]
    rows[17]["question"] = "A question that is refused?"
    (data / "videomme" / "videomme.json").write_text(json.dumps(rows))
    given = flags(data, out, task="videomme")
    assert "1 video is missing: vid1.mp4" in refused(evaluate.main, *given, "--strict")
    status, printed, err = command(evaluate.main, *given, "--json")
    assert status == 0
    assert "warning: videomme: 13 of 20 questions could not be asked" in err
    (row,) = json.loads(printed)["tasks"]
    assert (row["answered"], row["left_out"]) == (7, 13)
    page = (out / "report.md").read_text()
    assert "**13 of 20 questions could not be asked and are in no score.**" in page
    for words in (
        "vid1.mp4: no such video in the data folder: questions 4, 5, 6, 7",
        "vid2.mp4: cannot be read: questions 8, 9, 10, 11",
        "vid3.mp4: is torn: questions 12, 13, 14, 15",
        "the question is refused: question 17",
    ):
        assert words in page
    assert stub.watched == ["vid0.mp4", "vid4.mp4"]
    # Files that were put back are watched by the same command; nothing else is.
    stub.watched.clear()
    for name in ("vid1.mp4", "vid2.mp4"):
        (videos / name).write_bytes(b"video")
    assert "vid3.mp4: is torn" in refused(evaluate.main, *given, "--strict")
    assert stub.watched == ["vid1.mp4", "vid2.mp4"]
    (videos / "vid3.mp4").write_bytes(b"video")
    status, printed, _ = command(evaluate.main, *given, "--json")
    assert (json.loads(printed)["tasks"][0]["answered"], stub.watched[2:]) == (19, ["vid3.mp4", "vid4.mp4"])


def test_two_processes_do_not_write_one_shard(
    refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path
) -> None:
    from xl2jax.benchmarks.records import open_log

    (tmp_path / "out").mkdir()
    with open_log(tmp_path / "out", (0, 1)):
        assert "another process is writing it" in refused(evaluate.main, *flags(data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--shard", "3/3"), "i from 0 to n - 1"),
        (("--limit", 0), "--limit must be"),
        (("--task", "mlvu_dev,chess"), "no task 'chess': choose from videomme"),
        (("--task", "temporal_grounding_charades"), "belongs to --variant lmms-eval"),
        (("--max-frames", 8), "paper has the released values: leave out --max-frames"),
        (("--top-chunks", 9, "--pool", 2), "paper has the released values: leave out --top-chunks, --pool"),
        (
            ("--setting", "pure", "--window-chunks", 2, "--top-chunks", 9, "--offload"),
            "pure has neither chunks nor bi-level decoding: leave out --window-chunks, --offload, --top-chunks",
        ),
        (("--setting", "pure", "--select-chunk-groups", 2), "leave out --select-chunk-groups"),
        (
            ("--setting", "chunked", "--selection", "videomme.json", "--top-chunks", "all"),
            "chunked has no bi-level decoding: leave out --selection, --top-chunks",
        ),
        (
            ("--setting", "bilevel", "--selection", "videomme.json", "--pool", 2),
            "--selection says which chunks stay dense: leave out --pool",
        ),
        (("--task", "mlvu_test", "--offload"), "no bi-level decoding for mlvu_test: leave out --offload"),
        (("--selection", "chess.json"), "chess.json: no such file"),
        (("--variant", "lmms-eval", "--selection", "videomme.json"), "needs --variant upstream"),
        (("--setting", "bilevel", "--top-chunks", "all"), "give a number of chunks"),
        (("--task", "synthetic"), "upstream released no script for synthetic"),
        (("--task", "mlvu"), "no rows of mlvu"),
        (("--data", "/nowhere"), "/nowhere: no such folder"),
    ],
)
def test_wrong_flags(
    refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path, given: tuple[object, ...], words: str
) -> None:
    assert words in refused(evaluate.main, *flags(data, tmp_path / "out"), *given)
    assert stub.opened == []


def views(command: Command, stub: StubEngine, data: Path, out: Path, *given: object) -> set[Any]:
    assert command(evaluate.main, *flags(data, out, "--limit", 1), *given)[0] == 0
    return {view for _, view in stub.opened}


def test_released_settings(command: Command, stub: StubEngine, data: Path, tmp_path: Path) -> None:
    expected = {
        "pure": {(400, None, False, "drop")},
        "chunked": {(300, (4, 3), False, "fill"), (400, (6, 5), False, "fill")},
        "paper": {(400, (4, 3), True, "fill")},
    }
    for setting, wanted in expected.items():
        stub.opened.clear()
        seen = views(command, stub, data, tmp_path / setting, "--setting", setting)
        assert {
            (
                v.sampling.max_frames,
                None if v.prefill.window_chunks is None else (v.prefill.chunk_groups, v.prefill.window_chunks),
                v.bilevel is not None,
                v.last_group,
            )
            for v in seen
        } == wanted
        assert all(v.sampling.times == "upstream" for v in seen)


def test_what_the_model_is_asked(
    command: Command, refused: Callable[..., str], stub: StubEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are rewritten for upstream only, after the selection file was searched; subtitles are those of the video."""
    data = write_data(tmp_path / "data", videomme=4, longvideobench=2)
    srt = '1\n00:00:01,000 --> 00:00:09,000\n<font color="white" size=".72c">It is 02:35 now</font>\n'
    (data / "videomme" / "subtitle").mkdir()
    (data / "videomme" / "subtitle" / "vid0.srt").write_bytes(srt.replace("\n", "\r\n").encode())
    key = f"vid0.mp4_{videomme_row(1)['question']}"
    config = {"selected_topk": 1, "selected_chunk_size": 4, "compression": 2}
    selection = tmp_path / "videomme.json"
    selection.write_text(json.dumps({"x": {"config": config, "selected_unit_indices": {key: [7]}}}))
    asked: list[Ask] = []
    ask = StubVideo.ask
    monkeypatch.setattr(StubVideo, "ask", lambda self, question: asked.append(question) or ask(self, question))
    given = ("--limit", 2, "--setting", "bilevel")
    for variant, name, time_ in (
        ("upstream", "videomme", "at 0 seconds"),
        ("lmms-eval", "videomme", "at 00:00"),
        ("upstream", "videomme_w_subtitle", "It is 155 seconds now\n"),
        ("lmms-eval", "videomme_w_subtitle", "It is 02:35 now\n"),
    ):
        asked.clear()
        out = tmp_path / f"{variant} {name}"
        files = ("--selection", selection) if variant == "upstream" else ()
        assert command(evaluate.main, *flags(data, out, *given, *files, "--variant", variant, task=name))[0] == 0
        first, second = asked
        assert time_ in first.prompt
        assert "[" in first.prompt or variant == "lmms-eval"
        assert (first.by_file, first.selection, first.max_new_tokens) == (bool(files), None, 16)
        if files:
            assert second.selection is not None
            assert (second.selection.units, second.selection.pool) == ([7], 2)
        stored = json.loads((out / "answers-0-of-1.jsonl").read_text().splitlines()[0])["prompt"]
        assert "00:00" in stored
    given = (*given, "--selection", selection, "--limit", 1)
    assert "no question of videomme has an entry" in refused(
        evaluate.main, *flags(data, tmp_path / "x", *given, task="videomme")
    )
    given = (*given, "--variant", "lmms-eval")
    assert "needs --variant upstream" in refused(evaluate.main, *flags(data, tmp_path / "x", *given, task="videomme"))


def test_the_next_video_is_read_while_the_present_one_is_asked(
    command: Command, stub: StubEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer about each video but the last waits until all frames of the next one were read."""
    read = {f"vid{n}.mp4": threading.Event() for n in range(5)}
    batches, ask = StubOpened.batches, StubVideo.ask
    waited = []

    def reading(self: StubOpened) -> Iterator[np.ndarray]:
        yield from batches(self)
        read[self.path.name].set()

    def asking(self: StubVideo, question: Ask) -> Reply:
        following = f"vid{int(self.path.stem[3:]) + 1}.mp4"
        if following in read:
            waited.append(read[following].wait(timeout=30))
        return ask(self, question)

    monkeypatch.setattr(StubOpened, "batches", reading)
    monkeypatch.setattr(StubVideo, "ask", asking)
    assert command(evaluate.main, *flags(data, tmp_path / "out", "--limit", 20, task="videomme"))[0] == 0
    assert waited == [True] * 16


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 10 batches, no more than that wait for a caller that takes none."""
    batch = np.zeros((4, 8, 8, 3), np.uint8)
    monkeypatch.setattr(engine, "_AHEAD_BYTES", 10 * batch.nbytes)
    made: list[int] = []
    full = threading.Event()

    class Opened(StubOpened):
        def batches(self) -> Iterator[np.ndarray]:
            for number in range(30):
                made.append(number)
                if len(made) == 11:
                    full.set()
                yield batch

    with engine.ReadAhead([1, 2], lambda item: Opened(StubEngine(), Path("x"))) as ahead:
        ahead.next()
        assert full.wait(30)
        time.sleep(0.05)
        assert len(made) == 11  # the last one waits for room
        assert len(list(ahead.batches())) == 30
        ahead.next()
        ahead.drain()
    assert len(made) == 60


# --- results ------------------------------------------------------------------------------------


EXAMPLE = "lmms_eval_output_example/20261126_133642"
LMMS_TASKS = ("videomme", "mlvu_dev", "mlvu_test", "lvbench", "longvideobench_val_v")


def test_files_are_those_of_lmms_eval(goldens: Path, tmp_path: Path) -> None:
    """The canned answers of an example that lmms-eval wrote, through our records."""
    folder = goldens / "eval"
    records, counts = {}, {}
    for name in LMMS_TASKS:
        golden = json.loads((folder / f"{name}__lmms_eval.json").read_text())
        docs, answers = golden["docs"], golden["aggregates"][2]["responses"]
        counts[name] = {"questions": len(docs)}
        for i, (doc, text) in enumerate(zip(docs, answers, strict=True)):
            record = Record(task=name, doc_id=i, row=doc["doc"], prompt=doc["prompt"], video="v", text=text, seconds={})
            records[record.key] = record
    asked = {"variant": "lmms-eval", "setting": "pure", "limit": None, "tasks": counts}
    info = RunInfo(xl2jax="0", checkpoint="acme/Video-XL-2", files="f", shards=1, asked=asked, model={})
    scored = score(info, records)
    ours, theirs = (
        results_object(scored, "20261126_133642"),
        json.loads((folder / f"{EXAMPLE}_results.json").read_text()),
    )
    assert ours.keys() == theirs.keys()
    assert ours["config"].keys() == theirs["config"].keys()
    for name, golden in theirs["results"].items():
        assert list(ours["results"][name]) == list(golden)
        for metric, value in golden.items():
            expected = pytest.approx(value, abs=1e-12) if isinstance(value, float) else value
            assert ours["results"][name][metric] == expected
    same = ("n-samples", "higher_is_better", "versions", "n-shot", "group_subtasks", "task_hashes", "efficiency")
    for key in (*same, "model_name", "model_name_sanitized"):
        assert ours[key] == theirs[key], key
    for result in scored.tasks:
        golden_lines = (folder / f"{EXAMPLE}_samples_{result.task.name}.jsonl").read_text().splitlines()
        for line, golden_line in zip(sample_lines(result), golden_lines, strict=True):
            assert list(line.items()) == list(json.loads(golden_line).items())
    report.plot(tmp_path / "report.png", scored)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000


def test_a_watched_video_counts_once() -> None:
    """For all tasks that share it; but twice where it was watched twice."""
    once, again = {"read": 1.0, "watch": 10.0, "answer": 0.25}, {"read": 2.0, "watch": 20.0, "answer": 0.25}
    other = {"read": 4.0, "watch": 40.0, "answer": 0.25}
    made = [
        ("videomme", 0, "a.mp4", once), ("videomme", 1, "b.mp4", other),
        ("videomme_w_subtitle", 0, "a.mp4", once), ("videomme_w_subtitle", 1, "a.mp4", again),
    ]  # fmt: skip
    records = {
        (task, n): Record(task=task, doc_id=n, row=videomme_row(n), video=video, text="A", seconds=seconds)
        for task, n, video, seconds in made
    }
    asked = {"variant": "upstream", "setting": "pure", "tasks": {name: {"questions": 2} for name, *_ in made}}
    results = score(RunInfo(xl2jax="0", checkpoint="c", files="f", shards=1, asked=asked, model={}), records)
    assert total_seconds([s for task in results.tasks for s in task.scored]) == 11 + 22 + 44 + 4 * 0.25
    config = results_object(results, "now")["config"]
    unused = ("numpy_seed", "torch_seed", "fewshot_seed", "bootstrap_iters", "process_docs_parallel")
    assert [config[name] for name in unused] == [None] * 5


def test_reasoning_is_stripped_for_lmms_eval_only() -> None:
    row = videomme_row(0)
    texts = {}
    for variant in ("upstream", "lmms-eval"):
        record = Record(task="videomme", doc_id=0, row=row, video="v", text="<think>B</think>A", seconds={})
        asked = {"variant": variant, "setting": "pure", "tasks": {"videomme": {"questions": 1}}}
        info = RunInfo(xl2jax="0", checkpoint="c", files="f", shards=1, asked=asked, model={})
        (result,) = score(info, {record.key: record}).tasks
        (line,) = sample_lines(result)
        texts[variant] = line["filtered_resps"], line.get("resps"), result.value
    assert texts == {
        "upstream": ("<think>B</think>A", None, 0),
        "lmms-eval": ("A", ["<think>B</think>A"], 100),
    }


def test_a_missing_type_of_question_is_said(command: Command, stub: StubEngine, tmp_path: Path) -> None:
    rows = [{"video_name": "a.mp4", "question": "What?\n(A) x\n(B) y", "answer": "A", "task_type": "ego"}]
    (tmp_path / "mlvu_test").mkdir()
    (tmp_path / "mlvu_test" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mlvu_test" / "a.mp4").write_bytes(b"video")
    status, out, _ = command(evaluate.main, *flags(tmp_path, tmp_path / "out", "--json", task="mlvu_test"))
    assert (status, json.loads(out)["tasks"][0]["value"]) == (0, None)
    assert "raises ZeroDivisionError" in (tmp_path / "out" / "report.md").read_text()


def test_compare(command: Command, refused: Callable[..., str], stub: StubEngine, data: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for out, setting in ((a, "pure"), (b, "chunked")):
        assert command(evaluate.main, *flags(data, out, "--setting", setting, task="videomme"))[0] == 0
    answers = b / "answers-0-of-1.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    for row in lines:
        right = row["row"]["answer"]
        if row["doc_id"] < 10:
            row["text"] = "ABCD"[("ABCD".index(right) + 1) % 4]
        elif row["doc_id"] < 50:
            row["text"] = right
    answers.write_text("".join(json.dumps(row) + "\n" for row in lines))
    status, out, _ = command(evaluate.main, "compare", a, b, "--json")
    assert status == 0
    (found,) = json.loads(out)["tasks"]
    lost, won = found["only_first_right"], found["only_second_right"]
    assert {c["doc_id"] for c in found["changes"]} <= set(range(50))
    assert (found["questions"], found["same_score"]) == (120, 120 - lost - won)
    assert won > lost
    assert found["p"] == pytest.approx(mcnemar(lost, won))
    assert "videomme" in command(evaluate.main, "compare", a, b)[1]
    write_info = b / "run.json"
    write_info.unlink()
    assert "holds no run" in refused(evaluate.main, "compare", a, b)


def test_statistics() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert mcnemar(5, 5) == 1
    low, high = wilson(7, 10)
    assert (low, high) == (pytest.approx(0.39678, abs=1e-5), pytest.approx(0.89221, abs=1e-5))
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1
    assert standard_error([1.0]) is None
    values = [1.0, 0.0, 1.0, 1.0]
    # Every value its own cluster: nothing is added to the standard error.
    assert clustered_error(values, list("abcd")) == pytest.approx(standard_error(values))
    assert clustered_error(values, list("aaaa")) is None


# --- data sets ----------------------------------------------------------------------------------


def test_layouts_of_the_hub(tmp_path: Path) -> None:
    rows = [videomme_row(n) | {"url": "x"} for n in range(6)]
    hub = tmp_path / "Video-MME"
    (hub / "videomme").mkdir(parents=True)
    for shard in range(2):
        table = pyarrow.Table.from_pylist(rows[3 * shard : 3 * shard + 3])
        pyarrow.parquet.write_table(table, hub / "videomme" / f"test-0000{shard}-of-00002.parquet")
    (hub / "videos_chunked_01" / "data").mkdir(parents=True)
    (hub / "videos_chunked_01" / "data" / "vid0.MP4").write_bytes(b"x")
    (hub / "subtitle").mkdir()
    (hub / "subtitle" / "vid0.srt").write_text("")
    disk = tmp_path / "mlvu_test"
    (disk / "test").mkdir(parents=True)
    row = {"video_name": "3_ego/ego_1.mp4", "question": "What?", "answer": "A", "task_type": "ego"}
    with pyarrow.ipc.new_stream(
        disk / "test" / "data-00000-of-00001.arrow", pyarrow.Table.from_pylist([row]).schema
    ) as w:
        w.write_table(pyarrow.Table.from_pylist([row]))
    for folder in ("3_ego", "elsewhere"):
        (disk / "video" / folder).mkdir(parents=True)
        (disk / "video" / folder / "ego_1.mp4").write_text(folder)
    data = DataFolder(tmp_path)
    task = find_task("videomme", "upstream")
    assert [row.question_id for row in data.rows(task)] == [row["question_id"] for row in rows]
    assert data.find(task, "vid0.mp4") == hub / "videos_chunked_01" / "data" / "vid0.MP4"
    assert data.find(task, "vid1.mp4") is None
    assert data.find(task, "videomme/subtitle/vid0.srt") == hub / "subtitle" / "vid0.srt"
    mlvu = find_task("mlvu_test", "upstream")
    assert [row.video_name for row in data.rows(mlvu)] == ["3_ego/ego_1.mp4"]
    assert data.find(mlvu, "3_ego/ego_1.mp4") == disk / "video" / "3_ego" / "ego_1.mp4"
    with pytest.raises(UserError, match=r"ego_1.mp4: .* differ"):
        data.find(mlvu, "ego_1.mp4")
    (hub / "videomme" / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="shard 1 of 2 of test is missing"):
        DataFolder(tmp_path).rows(task)
    (hub / "videomme" / "test-00000-of-00002.parquet").write_bytes(b"PAR1")
    (hub / "videomme" / "test-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as a table"):
        DataFolder(tmp_path).rows(task)


def test_tables_are_not_mixed(tmp_path: Path) -> None:
    """Shards belong together only if their name and their number agree, and no number is beyond it."""
    task = find_task("videomme", "upstream")
    for names in (
        ("test-00000-of-00001", "videomme"),
        ("test-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"),
        ("test-00000-of-00001", "test-00001-of-00001"),
    ):
        folder = tmp_path / " ".join(names) / "videomme"
        folder.mkdir(parents=True)
        for n, name in enumerate(names):
            (folder / f"{name}.json").write_text(json.dumps([videomme_row(n)]))
        with pytest.raises(UserError, match="not shards of one table|is none of 1 shards"):
            DataFolder(folder.parent).rows(task)


def test_parts_of_lvbench_and_filters(tmp_path: Path) -> None:
    for kind in ("cartoon", "documentary", "live", "selfmedia", "sport", "tv"):
        row = {"video": kind, "question": "?", "candidates": ["(A) x", "(B) y"], "answer": "(B) y"}
        (tmp_path / f"lvbench_{kind}.json").write_text(json.dumps([row]))
    data = DataFolder(tmp_path)
    assert [row.video for row in data.rows(find_task("lvbench", "upstream"))][::5] == ["cartoon", "tv"]
    assert [row.video for row in data.rows(find_task("lvbench_tv", "upstream"))] == ["tv"]
    write_data(tmp_path / "more", videomme=24, longvideobench=8)
    data = DataFolder(tmp_path / "more")
    assert {row.duration for row in data.rows(find_task("videomme_mid", "upstream"))} == {"medium"}
    assert {row.duration for row in data.rows(find_task("videomme_long", "lmms-eval"))} == {"long"}
    group = find_task("longvideobench_val_v_600", "upstream")
    assert {row.duration_group for row in data.rows(group)} == {600}
    (tmp_path / "more" / "videomme" / "videomme.json").write_text(json.dumps([videomme_row(0) | {"options": "A"}]))
    with pytest.raises(UserError, match="videomme.json: row 0: options: should be a valid list"):
        data.rows(find_task("videomme", "upstream"))


def test_names_of_tasks() -> None:
    assert find_task("mlvu_dev", "upstream").name == "mlvu"
    assert find_task("mlvu", "lmms-eval").name == "mlvu_dev"
    for variant, tasks in ALL_TASKS.items():
        for name, task in tasks.items():
            assert (task.name, task.variant) == (name, variant)
    assert longvideobench_row(1)["option4"] == "N/A"


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": {}}, {"tasks": []}, {"tasks": {"synthetic": 5}}, {"tasks": {"synthetic": {}}}, {"variant": "x"},
        {"setting": None}, {"tasks": {"synthetic": {"questions": "x"}}},
        {"tasks": {"synthetic": {"questions": 1, "view": 5}}},
    ],
)  # fmt: skip
def test_a_damaged_description_of_a_run_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    asked = {"variant": "upstream", "setting": "chunked", "tasks": {"synthetic": {"questions": 1}}} | change
    about = {"xl2jax": "0", "checkpoint": "c", "files": "", "shards": 1, "asked": asked, "model": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"run\.json"):
        read_results([tmp_path])


def test_answers_to_questions_that_the_run_lacks_are_refused(tmp_path: Path) -> None:
    asked = {"variant": "upstream", "setting": "chunked", "tasks": {"synthetic": {"questions": 1}}}
    about = {"xl2jax": "0", "checkpoint": "c", "files": "", "shards": 1, "asked": asked, "model": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    for task, doc_id in (("synthetic", 1), ("synthetic", -1), ("x", 0)):
        record = Record(task=task, doc_id=doc_id, row={}, video="v", text="A")
        line = json.dumps(record.model_dump(exclude_defaults=True))
        (tmp_path / "answers-0-of-1.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match="which the run lacks"):
            read_results([tmp_path])


def test_a_pipe_in_place_of_the_answers_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers-0-of-1.jsonl")
    with pytest.raises(UserError, match="a pipe or a device"), open_log(tmp_path, (0, 1)):
        pass
