"""Compares this package with golden files: prompts, extractions and scores that the original code gave.

A file is named `{task}__{upstream|lmms_eval}.json`. The format is in docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xl2jax.benchmarks.extraction import rewrite_times, strip_reasoning
from xl2jax.benchmarks.mlvu import MLVU
from xl2jax.benchmarks.question_types import by_question_type
from xl2jax.benchmarks.released import RELEASED, SCRIPTS, Released
from xl2jax.benchmarks.selection_keys import selection_key
from xl2jax.benchmarks.subtitles import subtitle_text
from xl2jax.benchmarks.task import AGGREGATE_ERRORS, Task, Variant
from xl2jax.benchmarks.tasks import TASKS
from xl2jax.benchmarks.videomme import VideoMME
from xl2jax.errors import UserError, first_line, shorten
from xl2jax.inference.selection_files import read_selections
from xl2jax.prompt import IM_END, IM_START, PREFIX
from xl2jax.system.schema import read_json

TOLERANCE = 1e-9
"""Of aggregates: the originals add the types of MLVU in the order of a set."""
_IMAGE = "<image>"


@dataclasses.dataclass
class Comparison:
    """What was compared in one file. `first` describes the first difference."""

    file: str
    compared: dict[str, int] = dataclasses.field(default_factory=dict)
    differences: int = 0
    first: str = ""

    def compare(self, kind: str, where: str, ours: Any, golden: Any) -> None:
        self.compared[kind] = self.compared.get(kind, 0) + 1
        if not _equal(ours, golden):
            self.fail(f"{kind} of {where}: {shorten(repr(ours), 160)}, not {shorten(repr(golden), 160)}")

    def fail(self, reason: str) -> None:
        self.differences += 1
        self.first = self.first or reason

    @property
    def agrees(self) -> bool:
        return not self.differences and bool(self.compared)

    def row(self) -> dict[str, Any]:
        """For a table."""
        total = sum(self.compared.values())
        return {
            "file": self.file,
            "compared": total,
            "differences": self.differences,
            "of": " ".join(f"{kind}:{count}" for kind, count in self.compared.items()) or None,
            "first": self.first or ("nothing to compare" if not total else None),
        }


def check_folder(folder: Path) -> Iterator[Comparison]:
    """Compares all golden files of a folder. Raises UserError where it holds none."""
    files = sorted(folder.glob("*__*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: holds no golden file ({{task}}__upstream.json or {{task}}__lmms_eval.json)")
    for file in files:
        comparison = Comparison(file.name)
        try:
            _check_file(file, comparison)
        except UserError as e:
            comparison.fail(str(e))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
            comparison.fail(f"not in the format of golden files ({type(e).__name__}: {first_line(e)})")
        yield comparison


def _check_file(file: Path, comparison: Comparison) -> None:
    name, _, origin = file.stem.rpartition("__")
    golden = read_json(file, dict[str, Any])
    if origin not in ("upstream", "lmms_eval"):
        raise UserError(f"{origin!r} is neither upstream nor lmms_eval")
    special = _SPECIAL.get(name)
    if special is not None:
        special(file, golden, comparison)
        return
    task = _task(name, "upstream" if origin == "upstream" else "lmms-eval", golden.get("settings", {}))
    _check_docs(task, golden["docs"], comparison)
    for number, aggregate in enumerate(golden["aggregates"]):
        _check_aggregate(task, golden["docs"], aggregate, f"aggregate {number}", comparison)


def _task(name: str, variant: Variant, settings: Mapping[str, Any]) -> Task:
    """The task that the settings or the file's name say; a name may go on after the task's."""
    tasks = TASKS[variant]
    if settings.get("task") in tasks:
        return tasks[settings["task"]]
    found = [task for task in tasks if name.startswith(task)] or [t for t in tasks if name == tasks[t].folder]
    if not found:
        raise UserError(f"{variant} has no task of this name")
    return tasks[max(found, key=len)]


def chat_text(prompt: str) -> str:
    """The whole conversation as upstream tokenises it, with its times rewritten."""
    user = prompt if _IMAGE in prompt else f"{_IMAGE}\n{prompt}"
    return rewrite_times("".join([*PREFIX, user, IM_END, "\n", IM_START, "assistant\n"]))


def _check_docs(task: Task, docs: list[dict[str, Any]], comparison: Comparison) -> None:
    for number, entry in enumerate(docs):
        where = f"doc {number}"
        row = task.row(entry["doc"], where)
        subtitles = None
        if task.subtitle_frames is not None:
            subtitles = subtitle_text(entry["srt"], entry["frame_count"], entry["fps"], task.subtitle_frames)
        prompt = task.prompt(row, subtitles)
        comparison.compare("prompts", where, prompt, entry["prompt"])
        if "chat_prompt_after_time_rewrite" in entry:
            comparison.compare("chats", where, chat_text(prompt), entry["chat_prompt_after_time_rewrite"])
        _check_visual(task, row, entry["visual"], where, comparison)
        if entry.get("subtitle_path") is not None and isinstance(task, VideoMME):
            path = f"{task.home}/{task.subtitle_path(row)}"
            comparison.compare("paths", where, path, entry["subtitle_path"])
        for response in entry["responses"]:
            of = f"{where}, {shorten(repr(response['text']), 60)}"
            reading = task.read(row, response["text"])
            comparison.compare("extractions", of, reading.extracted, response["extracted"])
            comparison.compare("scores", of, reading.correct, response["score"])
            if "random_choice_from" in response or reading.choices:
                choices = response.get("random_choice_from") or []
                comparison.compare("choices", of, list(reading.choices), choices)


def _check_visual(task: Task, row: Any, visual: list[Any], where: str, comparison: Comparison) -> None:
    path = task.video_path(row)
    candidates = [f"{task.home}/{candidate}" for candidate in (path, *task.other_paths(path))]
    # Which of them exists was decided where the golden file was made.
    ours = next((candidate for candidate in candidates if candidate == visual[0]), candidates[0])
    comparison.compare("paths", where, ours, visual[0])
    comparison.compare("media options", where, task.media_options(row), visual[1] if len(visual) > 1 else None)


def _check_aggregate(
    task: Task, docs: list[dict[str, Any]], golden: Mapping[str, Any], where: str, comparison: Comparison
) -> None:
    indices = golden.get("doc_indices", range(len(docs)))
    seed = golden.get("random_seed_set_just_before_first_doc", 0)
    rng = random.Random(seed)
    rows = [task.row(docs[i]["doc"], f"doc {i}") for i in indices]
    samples = [task.sample(row, text, rng) for row, text in zip(rows, golden["responses"], strict=True)]
    try:
        result = {task.metric: task.aggregate(samples), **task.further_metrics(samples)}
        printed = task.printed(samples)
    except AGGREGATE_ERRORS as e:
        comparison.compare("aggregates", where, type(e).__name__, golden.get("raises", golden.get("result")))
        return
    comparison.compare("aggregates", where, result, golden.get("result", golden.get("raises")))
    lines = golden.get("printed", printed)
    in_any_order = isinstance(task, MLVU)  # it prints its types in the order of a set
    ours, theirs = (sorted(printed), sorted(lines)) if in_any_order else (printed, lines)
    comparison.compare("printed", where, ours, theirs)
    if "printed_values" in golden:
        comparison.compare("printed", where, printed_values(printed), golden["printed_values"])


def printed_values(lines: list[str]) -> dict[str, Any]:
    """Names and numbers of printed lines; a list of numbers where a name is printed more than once."""
    values: dict[str, list[float]] = {}
    for line in lines:
        if match := re.fullmatch(r"(.*\S): +([\d.]+)%", line):
            values.setdefault(match[1], []).append(float(match[2]))
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def _check_times(file: Path, golden: Mapping[str, Any], comparison: Comparison) -> None:
    for case in golden["cases"]:
        comparison.compare("time rewriting", repr(case["text"]), rewrite_times(case["text"]), case["rewritten"])


def _check_reasoning(file: Path, golden: Mapping[str, Any], comparison: Comparison) -> None:
    for case in golden["cases"]:
        comparison.compare("reasoning", repr(case["text"]), strip_reasoning(case["text"]), case["stripped"])


def _check_selection(file: Path, golden: Mapping[str, Any], comparison: Comparison) -> None:
    for benchmark in golden["benchmarks"].values():
        path = file.parent / benchmark["selection_file"]
        table, name = read_selections(path), path.name.partition(".json")[0]
        for number, case in enumerate(benchmark["cases"]):
            where = f"{name}, case {number}"
            key = selection_key(name, case["prompt"], case["video_path"])
            comparison.compare("selection keys", where, key, case["key"])
            entry, config = table.get(key), case["selected_config"]
            ours = None if entry is None else (entry.units, entry.select_chunk_groups, entry.pool)
            theirs = (
                None
                if config is None
                else (case["selected_unit_indices"], config["selected_chunk_size"], config["compression"])
            )
            comparison.compare("selections", where, ours, theirs)


def _check_merged(file: Path, golden: Mapping[str, Any], comparison: Comparison) -> None:
    for number, case in enumerate(golden["cases"]):
        task = TASKS["upstream"][case["benchmark"]]
        docs = read_json(file.with_name(f"{case['benchmark']}__upstream.json"), dict[str, Any])["docs"]
        indices = case.get("doc_indices", range(len(docs)))
        rows = [task.row(docs[i]["doc"], f"doc {i}") for i in indices]
        pairs = list(zip(rows, case["responses"], strict=True))
        comparison.compare("by question type", f"case {number}", by_question_type(task, pairs), case["result"])


def _check_settings(file: Path, golden: Mapping[str, Any], comparison: Comparison) -> None:
    for folder, scripts in golden["scripts"].items():
        for name, script in scripts.items():
            args = script["model_args"]
            theirs = Released(
                int(args["max_frames_num"]),
                int(args["block_size_chosed"]) if "block_size_chosed" in args else None,
                int(args["prev_blocks_num"]) if "prev_blocks_num" in args else None,
            )
            comparison.compare("settings", f"{folder}, {name}", RELEASED[name].get(SCRIPTS[folder]), theirs)


_SPECIAL: Mapping[str, Callable[[Path, Mapping[str, Any], Comparison], None]] = {
    "time_rewrite": _check_times,
    "reasoning_strip": _check_reasoning,
    "selection_keys": _check_selection,
    "merge_results": _check_merged,
    "settings": _check_settings,
}


def _equal(ours: Any, golden: Any) -> bool:
    """Equality, with a tolerance for floats, at any depth."""
    if isinstance(golden, float) and isinstance(ours, int | float):
        return abs(ours - golden) <= TOLERANCE
    if isinstance(golden, dict) and isinstance(ours, dict):
        return ours.keys() == golden.keys() and all(_equal(ours[k], golden[k]) for k in golden)
    if isinstance(golden, list | tuple) and isinstance(ours, list | tuple):
        return len(ours) == len(golden) and all(map(_equal, ours, golden))
    return bool(ours == golden)
