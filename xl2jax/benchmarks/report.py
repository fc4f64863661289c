"""`report.md` and its picture: scores with their intervals, what could not be answered, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xl2jax.benchmarks.lmms_files import total_seconds, watches
from xl2jax.benchmarks.results import Part, Results, TaskResult
from xl2jax.benchmarks.subtitles import NONE as NO_SUBTITLES
from xl2jax.errors import shorten
from xl2jax.system.atomic import replacing_file
from xl2jax.system.figures import BLUE, new_figure, save_figure

_LISTED = 20
"""How many questions and videos are named before the rest is only counted."""


def write_report(folder: Path, results: Results) -> Path:
    """Writes `report.md` and `report.png`; returns the former. Raises UserError where they cannot be written."""
    plot(folder / "report.png", results)
    file = folder / "report.md"
    with replacing_file(file) as beside:
        beside.write_text("\n".join(report_lines(results)) + "\n", encoding="utf-8")
    return file


def report_lines(results: Results) -> Iterator[str]:
    """Everything before `## Time` depends on the answers alone, so that a resumed run has the same lines."""
    info = results.info
    yield f"# {', '.join(r.task.name for r in results.tasks)}\n"
    limit = info.asked.get("limit")
    yield f"Prompts, extraction and scores are those of {info.asked['variant']}. Setting: {info.asked['setting']}." + (
        f" Only the first {limit} questions of each task." if limit else ""
    )
    yield f"\n- checkpoint: `{info.checkpoint}` ({info.model.get('fingerprint', 'unknown')})"
    yield f"- dtype: {info.model.get('dtype')}, weights: {info.model.get('weights') or 'as they are'}"
    for result in results.tasks:
        yield f"- {result.task.name}: {_view(result.view)}"
    yield "\n## Scores\n"
    yield "| task | metric | value | mean score, 95 % interval | mean over categories | answered | not parsed |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in results.tasks:
        cells = [r.task.name, r.task.metric, _value(r), _interval(r.micro), _percent(r.macro)]
        yield _row([*cells, f"{len(r.scored)} of {r.questions}", str(len(r.unparsed))])
        for name, value in r.further.items():
            yield _row(["", name, f"{value:.2f}", "", "", "", ""])
    yield "\n![scores by category and length](report.png)"
    for r in results.tasks:
        yield from _task_lines(r)
    yield "\n## Time\n"
    yield "| task | frames a question | seconds a question | waiting for frames | watching | answering |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in results.tasks:
        yield _row([r.task.name, *_costs(r)])


def _view(view: Mapping[str, object]) -> str:
    sampling, prefill = view.get("sampling"), view.get("prefill")
    frames = sampling.get("max_frames") if isinstance(sampling, Mapping) else "?"
    chunks = "dense prefill"
    if isinstance(prefill, Mapping) and prefill.get("window_chunks") is not None:
        chunks = f"chunks of {prefill['chunk_groups']} groups, window of {prefill['window_chunks']} chunks"
    bilevel = view.get("bilevel")
    decoding = "dense decoding"
    if isinstance(bilevel, Mapping):
        decoding = "bi-level decoding, " + (
            "chunks by upstream's selection files" if "selection" in bilevel else "chunks by the model's attention"
        )
    return f"up to {frames} frames, {chunks}, {decoding}"


def _task_lines(r: TaskResult) -> Iterator[str]:
    yield f"\n## {r.task.name}\n"
    if r.problem:
        yield f"There is no value of {r.task.metric}: {r.problem}.\n"
    if r.unanswered:
        yield (
            f"**{len(r.unanswered)} of {r.questions} questions could not be asked and are in no score.** If they counted as "
            f"wrong, the mean score would be {_percent(r.as_wrong)}.\n"
        )
        reasons: dict[str, list[int]] = {}
        for record in r.unanswered:
            reasons.setdefault(record.error or "unknown", []).append(record.doc_id)
        yield from _listed(f"{reason}: {_numbers(ids)}" for reason, ids in reasons.items())
        yield ""
    if r.without_subtitles:
        yield (
            f"{r.without_subtitles} of {r.questions} questions without subtitles: the data folder has no file of them, "
            f'and their prompts say "{NO_SUBTITLES}".\n'
        )
    whole = sum(s.record.dense for s in r.scored) if "selection" in (r.view.get("bilevel") or {}) else 0
    if whole:
        yield f"{whole} of {len(r.scored)} answers read the whole dense cache: the selection files have no entry for them.\n"
    broken = {s.record.video: s.record for s in r.scored if _incomplete(s.record)}
    if broken:
        yield "These videos are damaged; the questions were asked about what could be read:\n"
        yield from _listed(
            f"{video}: {record.frames} of {record.chosen_frames} frames, {record.damaged_frames} replaced by the next one"
            for video, record in broken.items()
        )
        yield ""
    for title, parts in (("category", r.by_category), ("length of the video", r.by_duration)):
        yield f"| {title} | questions | mean score, 95 % interval |\n| --- | --- | --- |"
        for name, found in parts.items():
            yield _row([name, str(found.count), _interval(found)])
        yield ""
    if r.unparsed:
        yield "No answer was found in these texts:\n"
        yield from _listed(f"question {s.record.doc_id}: `{shorten(s.text, 60)!r}`" for s in r.unparsed)
        yield ""
    if r.printed:
        yield f"What the code of {r.task.variant} logs:\n\n```"
        yield from r.printed
        yield "```"
    if r.by_upstreams_script:
        yield "\nWhat upstream's script for bi-level runs (`merge_results.py`) would count:\n"
        yield "| type of question | right | questions | percent |\n| --- | --- | --- | --- |"
        for kind, counts in r.by_upstreams_script.items():
            yield _row([kind, f"{counts['correct']}", f"{counts['total']}", f"{counts['accuracy']:.2f}"])


def _incomplete(record: object) -> bool:
    frames, chosen = getattr(record, "frames", 0), getattr(record, "chosen_frames", 0)
    return frames < chosen or getattr(record, "damaged_frames", 0) > 0


def _listed(items: Iterator[str]) -> Iterator[str]:
    lines = list(items)
    yield from (f"- {line}" for line in lines[:_LISTED])
    if len(lines) > _LISTED:
        yield f"- and {len(lines) - _LISTED} more"


def _numbers(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    return f"question{'s' if len(ids) > 1 else ''} " + ", ".join(map(str, ids[:10])) + more


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(r: TaskResult) -> str:
    if r.value is None:
        return "none"
    return f"{r.value:.2f} %" if r.task.unit == 100 else f"{r.value:.5f}"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2f} %"


def _interval(found: Part | None) -> str:
    return "none" if found is None else f"{100 * found.score:.2f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _costs(r: TaskResult) -> list[str]:
    count = len(r.scored)
    if not count:
        return ["none"] * 5
    watched = watches(r.scored)
    reading = sum(read for _, read, _ in watched) / count
    watching = sum(watch for _, _, watch in watched) / count
    answering = sum(s.record.seconds.get("answer", 0.0) for s in r.scored) / count
    frames = sum(s.record.frames for s in r.scored) / count
    return [f"{frames:.0f}", *(f"{x:.2f}" for x in (total_seconds(r.scored) / count, reading, watching, answering))]


def plot(path: Path, results: Results) -> None:
    """Plots mean scores by category and by length of the video, with their intervals; a row for each task."""
    tables = [(r.task.name, title, parts) for r in results.tasks
              for title, parts in (("category", r.by_category), ("length", r.by_duration)) if parts]  # fmt: skip
    if not tables:
        return
    rows = [max(len(parts) for _, _, parts in tables[i : i + 2]) for i in range(0, len(tables), 2)]
    figure = new_figure(11, sum(0.8 + 0.28 * n for n in rows))
    axes = figure.subplots(len(rows), 2, squeeze=False, gridspec_kw={"height_ratios": [n + 2 for n in rows]})
    for axis, (name, title, parts) in zip(axes.flat, tables, strict=True):
        places = range(len(parts))
        scores = [100 * p.score for p in parts.values()]
        errors = [[s - 100 * p.low for s, p in zip(scores, parts.values(), strict=True)],
                  [100 * p.high - s for s, p in zip(scores, parts.values(), strict=True)]]  # fmt: skip
        axis.barh(places, scores, xerr=errors, color=BLUE, ecolor="black", capsize=2, height=0.7)
        axis.set_yticks(places, [f"{n} ({p.count})" for n, p in parts.items()], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("mean score, %", fontsize=8)
        axis.set_title(f"{name}, by {title}", fontsize=9)
    save_figure(figure, path)
