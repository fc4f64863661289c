"""A run in the files of lmms-eval 0.7.3: `{date}_samples_{task}.jsonl` and `{date}_results.json`."""

from __future__ import annotations

import datetime
import hashlib
import json
import statistics
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xl2jax.benchmarks.results import Results, Scored, TaskResult
from xl2jax.benchmarks.statistics import clustered_error, standard_error
from xl2jax.benchmarks.task import sanitized
from xl2jax.system.atomic import replacing_file

# lmms-eval hashes the document of a request, and its requests hold none.
_DOC_HASH = hashlib.sha256(b"null").hexdigest()
_NONE = "N/A"


def write_lmms_files(folder: Path, results: Results, date: datetime.datetime) -> Path:
    """Writes a samples file for each task and the results file below `folder`; returns the results file.

    Earlier files of the run are kept: their names have other dates.
    """
    stamp = date.strftime("%Y%m%d_%H%M%S")
    target = folder / sanitized(results.info.checkpoint)
    target.mkdir(parents=True, exist_ok=True)
    for result in results.tasks:
        with replacing_file(target / f"{stamp}_samples_{result.task.name}.jsonl") as beside:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in sample_lines(result))
            beside.write_text("".join(lines), encoding="utf-8")
    file = target / f"{stamp}_results.json"
    with replacing_file(file) as beside:
        text = json.dumps(results_object(results, stamp), ensure_ascii=False, indent=2)
        beside.write_text(text, encoding="utf-8")
    return file


def sample_lines(result: TaskResult) -> Iterator[dict[str, Any]]:
    """The lines of a samples file, in the order of the rows."""
    for s in result.scored:
        tokens = {"input_tokens": s.record.input_tokens, "output_tokens": s.record.output_tokens}
        submission = result.task.submission(s.row, s.text)
        metrics = [result.task.metric, *result.further] if isinstance(s.sample, dict) else [result.task.metric]
        yield {
            "doc_id": s.record.doc_id,
            "target": result.task.target(s.row),
            **({"resps": [s.record.text]} if s.record.text != s.text else {}),
            "filtered_resps": s.text,
            "token_counts": [tokens if s.record.output_tokens else None],
            "doc_hash": _DOC_HASH,
            **dict.fromkeys(metrics, s.sample),
            **({"submission": submission} if submission is not None else {}),
            "input": s.record.prompt,
        }


def _metrics(result: TaskResult) -> dict[str, Any]:
    """The entry of a task below `results`."""
    task = result.task
    entry: dict[str, Any] = {"alias": task.name}
    numeric = [s.score for s in result.scored] if _has_score(result) else None
    error = standard_error(numeric) if numeric else None
    clusters = [s.sample[task.cluster] for s in result.scored if task.cluster and isinstance(s.sample, dict)]
    clustered = clustered_error(numeric, clusters) if numeric and clusters else None
    for name, value in {task.metric: result.value, **result.further}.items():
        entry[f"{name},none"] = value
        plain = error if isinstance(_first(result), bool) else None  # of the aggregation `mean` only
        entry[f"{name}_stderr,none"] = _NONE if plain is None else plain
        entry[f"{name}_stderr_clt,none"] = _NONE if error is None else error
        entry[f"{name}_stderr_clustered,none"] = _NONE if clustered is None else clustered
    if result.scored and task.submission(result.scored[0].row, "") is not None:
        entry |= {"submission,none": [], "submission_stderr,none": []}
    return entry


def _first(result: TaskResult) -> Any:
    return result.scored[0].sample if result.scored else None


def _has_score(result: TaskResult) -> bool:
    """Whether lmms-eval finds a number in each sample: the sample itself, or its `score`."""
    first = _first(result)
    return isinstance(first, bool) or (isinstance(first, dict) and "score" in first)


def _tokens(scored: list[Scored], numeric: bool) -> dict[str, Any]:
    """Token counts of some answers, under `efficiency`."""
    counted = [s for s in scored if s.record.output_tokens]
    given, made = (
        sum(s.record.input_tokens for s in counted),
        sum(s.record.output_tokens for s in counted),
    )
    right = sum(s.score for s in scored) if numeric else 0.0
    return {
        "docs": float(len(scored)),
        "docs_with_token_counts": float(len(counted)),
        "total_input_tokens": float(given),
        "total_output_tokens": float(made),
        "total_tokens": float(given + made),
        "total_correct_score": right,
        "avg_output_tokens_per_sample": statistics.fmean(s.record.output_tokens for s in counted) if counted else 0.0,
        "tokens_per_correct_answer": made / right if right else None,
    }


def _config(result: TaskResult) -> dict[str, Any]:
    task = result.task
    return {
        "task": task.name,
        "dataset_path": task.dataset,
        "test_split": task.split,
        "metric_list": [{"metric": task.metric, "higher_is_better": True}],
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": task.max_new_tokens, **task.greedy},
        "num_fewshot": 0,
        "repeats": 1,
        "metadata": [{"variant": task.variant, "setting": result.setting}],
    }


def results_object(results: Results, stamp: str) -> dict[str, Any]:
    """The content of the results file."""
    info, tasks = results.info, {r.task.name: r for r in results.tasks}
    ran = [s for r in results.tasks for s in r.scored]
    numeric = {name: _has_score(r) for name, r in tasks.items()}
    overall = _tokens(ran, numeric=False)
    right = sum(s.score for name, r in tasks.items() if numeric[name] for s in r.scored)
    overall |= {
        "total_correct_score": right,
        "tokens_per_correct_answer": overall["total_output_tokens"] / right if right else None,
    }
    args = [f"pretrained={info.checkpoint}", f"setting={info.asked['setting']}", f"dtype={info.model.get('dtype')}"]
    seconds = total_seconds(ran)
    return {
        "results": {name: _metrics(r) for name, r in sorted(tasks.items())},
        "group_subtasks": {name: [] for name in tasks},
        "configs": {name: _config(r) for name, r in sorted(tasks.items())},
        "versions": dict.fromkeys(sorted(tasks), "Yaml"),
        "n-shot": dict.fromkeys(sorted(tasks), 0),
        "higher_is_better": {name: {r.task.metric: True} for name, r in sorted(tasks.items())},
        "n-samples": {name: {"original": r.questions, "effective": len(r.scored)} for name, r in tasks.items()},
        "config": {
            "model": "xl2jax",
            "model_args": ",".join(args),
            "model_backend": "xl2jax",
            "batch_size": 1,
            "batch_sizes": [],
            "device": None,
            "use_cache": None,
            "limit": info.asked.get("limit"),
            "offset": 0,
            "bootstrap_iters": None,
            "process_docs_parallel": None,
            "gen_kwargs": None,
            "random_seed": 0,
            "numpy_seed": None,
            "torch_seed": None,
            "fewshot_seed": None,
            "resolved_cli_args": info.asked,
        },
        "git_hash": None,
        "git_branch": None,
        "lmms_eval_version": f"xl2jax@{version('xl2jax')}",
        "date": stamp,
        "usage": {},
        "efficiency": {
            "by_task": {name: _tokens(r.scored, numeric[name]) for name, r in tasks.items()},
            "overall": overall,
        },
        "task_hashes": {name: _task_hash(len(r.scored)) for name, r in tasks.items()},
        "model_source": "xl2jax",
        "model_name": info.checkpoint,
        "model_name_sanitized": sanitized(info.checkpoint),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False,
        "chat_template": None,
        "chat_template_sha": None,
        "start_time": 0.0,
        "end_time": seconds,
        "total_evaluation_time_seconds": str(seconds),
    }


def _task_hash(count: int) -> str:
    return hashlib.sha256("".join(f"sample_{i}{_DOC_HASH}" for i in range(count)).encode()).hexdigest()


def watches(scored: list[Scored]) -> set[tuple[str, float, float]]:
    """Each watching of a video: its name, the seconds of waiting for frames, and those of watching.

    Answers that share a watching, even of different tasks, have the same seconds. A video that was watched again, in
    another way or after a kill, has others.
    """
    return {(s.record.video, s.record.seconds.get("read", 0.0), s.record.seconds.get("watch", 0.0)) for s in scored}


def total_seconds(scored: list[Scored]) -> float:
    """Seconds of watching and answering, with each watching of a video counted once."""
    videos = sum(read + watch for _, read, watch in watches(scored))
    return videos + sum(s.record.seconds.get("answer", 0.0) for s in scored)
