"""`xl2jax eval check`: the golden files of both code bases, and that a changed one is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xl2jax.benchmarks import extraction
from xl2jax.benchmarks.charades import Charades, overlap, read_span
from xl2jax.benchmarks.golden_files import check_folder
from xl2jax.commands import evaluate


@pytest.fixture
def eval_goldens(goldens: Path) -> Path:
    return goldens / "eval"


def test_all_golden_files_agree(command: Callable[..., tuple[int, str, str]], eval_goldens: Path) -> None:
    status, out, err = command(evaluate.main, "check", eval_goldens, "--json")
    assert status == 0, err + out
    report = json.loads(out)
    assert report["agree"]
    assert {row["file"] for row in report["files"]} == {path.name for path in eval_goldens.glob("*.json")}
    assert sum(row["compared"] for row in report["files"]) > 30_000


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """A change of the value at a path such as `docs.0.prompt`."""

    def change(golden: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            golden = golden[part]
        assert golden[last] != value
        golden[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "path", "value", "kind"),
    [
        ("videomme__upstream", "docs.0.prompt", "x", "prompts of doc 0"),
        ("videomme__upstream", "docs.3.chat_prompt_after_time_rewrite", "x", "chats of doc 3"),
        ("videomme__lmms_eval", "docs.0.visual.0", "${HF_HOME}/videomme/data/other.mp4", "paths of doc 0"),
        ("videomme__lmms_eval", "docs.1.visual.0", "${HOME}/videomme/data/P4zDL_ak6J0.mp4", "paths of doc 1"),
        ("videomme_w_subtitle__upstream", "docs.3.frame_count", 100, "prompts of doc 3"),
        ("mlvu_dev__upstream", "docs.2.responses.5.extracted", "Q", "extractions of doc 2"),
        ("mlvu_test__lmms_eval", "docs.2.responses.5.score", 0.5, "scores of doc 2"),
        ("lvbench__lmms_eval", "docs.0.doc.answer", "Z", "scores of doc 0"),
        ("lvbench__upstream", "aggregates.0.result.lvbench_mc_accuracy", 94.4444444, "aggregates of aggregate 0"),
        ("mlvu_test__upstream", "aggregates.0.printed.0", "x", "printed of aggregate 0"),
        ("longvideobench_val_v__upstream", "docs.0.responses.0.extracted", None, "extractions of doc 0"),
        ("longvideobench_val_v__upstream", "aggregates.3.random_seed_set_just_before_first_doc", 1, "aggregate 3"),
        ("time_rewrite__upstream", "cases.0.rewritten", "x", "time rewriting"),
        ("reasoning_strip__lmms_eval", "cases.0.stripped", "x", "reasoning of"),
        ("selection_keys__upstream", "benchmarks.mlvu.cases.0.key", "x", "selection keys of mlvu, case 0"),
        ("selection_keys__upstream", "benchmarks.mlvu.cases.0.selected_unit_indices", [5], "selections of mlvu"),
        ("merge_results__upstream", "cases.0.result.global.correct", -1, "by question type of case 0"),
        ("settings__upstream", "scripts.pure.videomme.model_args.max_frames_num", "300", "settings of pure, videomme"),
        ("time_rewrite__upstream", "cases", [], "nothing to compare"),
        ("videomme__upstream", "docs.0.doc.options", 7, "options"),
        ("videomme__upstream", "docs", 7, "not in the format"),
    ],
)
def test_a_difference_is_noticed(
    eval_goldens: Path, tmp_path: Path, name: str, path: str, value: Any, kind: str
) -> None:
    shutil.copytree(eval_goldens / "selection", tmp_path / "selection")
    for part in ("videomme", "lvbench") if name.startswith("merge") else ():
        shutil.copy(eval_goldens / f"{part}__upstream.json", tmp_path)
    golden = json.loads((eval_goldens / f"{name}.json").read_text())
    _set(path, value)(golden)
    (tmp_path / f"{name}.json").write_text(json.dumps(golden))
    (row,) = (c.row() for c in check_folder(tmp_path) if c.file == f"{name}.json")
    assert kind in row["first"]


@pytest.mark.parametrize("name", ["mlvu_dev__upstream", "lvbench__upstream", "videomme_w_subtitle__lmms_eval"])
@pytest.mark.parametrize("kind", ["visual", "subtitle_path"])
def test_another_home_is_noticed(eval_goldens: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Also where all videos, or all subtitles, of a file lie there."""
    golden = json.loads((eval_goldens / f"{name}.json").read_text())
    moved = [doc for doc in golden["docs"] if doc.get(kind)]
    for doc in moved:
        path = doc[kind][0] if kind == "visual" else doc[kind]
        elsewhere = f"ELSEWHERE/{path.partition('/')[2]}"
        doc[kind] = [elsewhere, *doc[kind][1:]] if kind == "visual" else elsewhere
    (tmp_path / f"{name}.json").write_text(json.dumps(golden))
    (comparison,) = check_folder(tmp_path)
    assert comparison.differences == len(moved)
    assert not moved or comparison.first.startswith("paths of doc")


def test_other_files(command: Callable[..., tuple[int, str, str]], refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no golden file" in refused(evaluate.main, "check", tmp_path)
    assert "no golden file" in refused(evaluate.main, "check", tmp_path / "none")
    (tmp_path / "chess__upstream.json").write_text('{"docs": [], "aggregates": []}')
    status, out, _ = command(evaluate.main, "check", tmp_path)
    assert status == 1
    assert "has no task of this name" in out


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("The event happens in the 24.3 - 30.4 seconds.", (24.3, 30.4)),
        ("from 00:18 to 0:23", (18, 23)),
        ("It starts at 00:00:18 and ends at 00:00:23.", (18, 23)),
        ("The start time is 12 seconds!\nThe end time is 3.5 seconds.", (3.5, 12)),
        ("5s - 8s", (5, 8)),
        ("1 - 2. It happens in 7 - 9", (1, 2)),
        ("1 - 2\nIt happens in 7 - 9", (7, 9)),
        ("never", None),
    ],
)
def test_times_in_free_text(text: str, span: tuple[float, float] | None) -> None:
    assert read_span(text) == span


def test_grounding_scores() -> None:
    assert overlap((0, 10), (5, 15)) == pytest.approx(1 / 3)
    assert overlap((0, 1), (2, 3)) == 0
    assert overlap((2, 2), (2, 2)) == 0
    task = Charades()
    row = task.row({"video": "a.mp4", "caption": "a person sits", "timestamp": [0.0, 10.0]})
    other = task.row({"video": "b.mp4", "caption": "a person sits", "timestamp": "[10.0, 20.0]"})
    answers = [(row, "0 - 10"), (row, "5 - 10"), (other, "10 - 13"), (other, "?")]
    samples = [task.sample(r, text, None) for r, text in answers]  # type: ignore[arg-type]
    # Rows with the same key count once, with the last answer.
    assert task.aggregate(samples) == pytest.approx((50 + 0) / 2)
    assert task.further_metrics(samples[:3]) == {
        "charades_sta_IOU@3": 100, "charades_sta_IOU@5": 50, "charades_sta_IOU@7": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "piece",
    ["A ", "(A", "1", "1 ", " ", "<think>", "<think></think>", "<thi<think></think>nk>", "00:0", "1.", "1s ", "A.\n"],
)
def test_long_texts_take_linear_time(piece: str) -> None:
    """A quadratic rule would take minutes here."""
    text = piece * (200_000 // len(piece))
    extraction.first_letter(text, "ABCD", extraction.VIDEOMME_PREFIXES)
    extraction.before_bracket(text)
    extraction.lvbench_answer(text)
    extraction.lvbench_answer(f"A.{text}x\ny")
    extraction.option_letter(text)
    extraction.strip_reasoning(text)
    read_span(text)
