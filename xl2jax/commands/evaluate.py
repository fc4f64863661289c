"""`xl2jax eval`: benchmarks of video understanding from local files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from xl2jax.commands.flags import DEFAULT_CHECKPOINT, BilevelFlags, DeviceFlags, parse_shard, require_checkpoint
from xl2jax.config import Weights
from xl2jax.errors import UserError, require_whole
from xl2jax.system.tables import print_table
from xl2jax.system.terminal import flag_errors, require_stdout

if TYPE_CHECKING:
    from xl2jax.benchmarks.runner import Group
    from xl2jax.benchmarks.selection_keys import SelectionTable
    from xl2jax.inference.api import Model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """Asks a benchmark's questions about local videos, and scores the answers as upstream or lmms-eval does.

    `xl2jax eval merge`, `compare`, `check` and `synthetic` are commands of their own.
    """

    task: str
    """Tasks separated by commas, such as videomme,mlvu_dev,lvbench,longvideobench_val_v."""
    data: Path
    """Folder of the data sets' files, as unpacked from the hub. Nothing is downloaded."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the run. A run that is there goes on, if its settings are the same."""
    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """Orbax folder, PyTorch folder or hub id (BAAI/Video-XL-2)."""
    variant: Literal["upstream", "lmms-eval"] = "upstream"
    """Whose prompts, extraction and scores: upstream's evaluation, or lmms-eval 0.7.3."""
    setting: Literal["pure", "chunked", "bilevel", "paper"] = "paper"
    """How videos are read. pure: dense. chunked: chunked prefill. bilevel: and bi-level decoding. paper: bilevel with the
    released values of each task, which no flag changes."""
    limit: int | None = None
    """Asks the first questions of each task only."""
    shard: str = "0/1"
    """i/n takes every n-th video from the i-th on, counted from 0, so that n processes share a run."""
    strict: bool = False
    """Stops at a video that is missing or cannot be read. Otherwise its questions are left out of the scores and listed."""
    max_frames: int | None = None
    """The largest number of frames, in place of the released one."""
    chunk_groups: int | None = None
    """Groups (of 4 frames) in a prefill chunk, in place of the released number."""
    window_chunks: int | None = None
    """How many chunks before its own a visual token sees, in place of the released number."""
    bilevel: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    selection: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A selection file of upstream's, in place of the model's own choice of chunks; may be given several times."""
    backend: Literal["auto", "pyav", "decord"] = "auto"
    """What reads videos; auto is pyav, and upstream used decord."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """dtype of parameters, KV and activations; by default that of the checkpoint."""
    weights: Weights | None = None
    """Quantises the LLM's matrices to 8 or 4 bits on loading."""
    cache_dtype: Literal["int8"] | None = None
    """Keeps the video's KV in 8 bits."""
    offload: bool = False
    """Moves the video's dense KV to host memory; for bi-level decoding only."""
    devices: tyro.conf.OmitArgPrefixes[DeviceFlags] = dataclasses.field(default_factory=DeviceFlags)
    json: bool = False
    """Prints one JSON object instead of a table."""


def run() -> int:
    """`xl2jax eval`."""
    with flag_errors():
        args = tyro.cli(RunArgs, prog="xl2jax eval")
    require_stdout()
    from xl2jax.benchmarks.checkpoint_identity import files_identity
    from xl2jax.benchmarks.engine import ModelEngine
    from xl2jax.benchmarks.records import RunInfo, open_log, read_info, write_info
    from xl2jax.benchmarks.runner import Run

    shard, groups, table, asked = _checked(args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{args.output}: cannot be written ({e.strerror})") from None
    earlier = read_info(args.output)
    if earlier is not None:  # refused before weights are read
        write_info(args.output, earlier.model_copy(update={"asked": asked, "shards": shard[1]}))
    files = files_identity(args.checkpoint)
    mine = groups[shard[0] :: shard[1]]
    with open_log(args.output, shard) as log:
        if earlier is None and log.done:
            raise UserError(f"{args.output}: has answers, but run.json, which says to what, is missing")
        left = [q for group in mine for q in group.questions if q.key not in log.done]
        logger.info(
            "%d questions about %d videos, %d of them left", sum(len(g.questions) for g in mine), len(mine), len(left)
        )
        # Other files may hold the same parameters, in another layout: only the loaded model tells.
        if left or earlier is None or earlier.files != files:
            import xl2jax
            from xl2jax.system.backend import start_backend

            devices = args.devices.devices()
            start_backend()
            models = xl2jax.load_copies(args.checkpoint, devices, dtype=args.dtype, weights=args.weights, progress=True)
            model, ended = models[0], threading.Event()
            info = RunInfo(
                xl2jax=version("xl2jax"),
                checkpoint=args.checkpoint,
                files=files,
                shards=shard[1],
                asked=asked,
                model={"fingerprint": model.fingerprint, "dtype": model.dtype, "weights": model.config.llm.weights},
            )
            write_info(args.output, info)

            def ask(model: Model, number: int) -> int:
                run = Run(ModelEngine(model), log, table, strict=args.strict, number=number, ended=ended)
                return run.run(mine[number :: devices.copies])

            xl2jax.share(models, ask, range(devices.copies))
    if shard[1] > 1:
        logger.info("shard %s is done; when all are: xl2jax eval merge %s", args.shard, args.output)
        return 0
    return _present([args.output], args.output, args.json)


def _checked(args: RunArgs) -> tuple[tuple[int, int], list[Group], SelectionTable | None, dict[str, Any]]:
    """The shard, the questions by video, the selection files, and what of the run goes into `run.json`.

    Raises UserError for everything that is wrong with the flags or the data. Loads no model and opens no video.
    """
    from xl2jax.benchmarks.dataset import DataFolder
    from xl2jax.benchmarks.runner import collect, describe_questions
    from xl2jax.benchmarks.selection_keys import SelectionTable
    from xl2jax.benchmarks.settings import Overrides, describe, make_view, refuse_unread
    from xl2jax.benchmarks.tasks import find_task
    from xl2jax.inference.video_cache import CacheConfig

    shard = parse_shard(args.shard, first=0)
    args.devices.devices()  # raises UserError for numbers out of range
    if args.limit is not None:
        require_whole("--limit", args.limit, 1)
    require_checkpoint(args.checkpoint)
    files = list(args.selection)
    refuse_unread(args.setting, _changed(args), by_file=bool(files))
    tasks = [find_task(name, args.variant) for name in dict.fromkeys(args.task.split(","))]
    overrides = Overrides(args.max_frames, args.chunk_groups, args.window_chunks)
    cache = CacheConfig(args.cache_dtype, args.offload)
    views = {
        task.name: make_view(task, args.setting, overrides, args.bilevel.bilevel(), cache, args.backend)
        for task in tasks
    }
    if files and args.variant != "upstream":
        raise UserError("--selection needs --variant upstream: the files' keys are made from its prompts")
    table = SelectionTable(files) if files else None
    groups = collect(DataFolder(args.data), tasks, views, args.limit)
    described = describe_questions(groups, {name: describe(view, files) for name, view in views.items()})
    _check_data(args, groups, table, described)
    asked: dict[str, Any] = {"variant": args.variant, "setting": args.setting, "limit": args.limit, "tasks": described}
    asked |= {"dtype": args.dtype, "weights": args.weights}
    # What tuples are in JSON, so that the settings can be compared with those on the disk.
    return shard, groups, table, json.loads(json.dumps(asked))


def _changed(args: RunArgs) -> list[str]:
    """The flags about reading videos and answering whose value is not the default."""
    values: dict[str, tuple[Any, Any]] = {
        "--max-frames": (args.max_frames, None),
        "--chunk-groups": (args.chunk_groups, None),
        "--window-chunks": (args.window_chunks, None),
        "--selection": (args.selection, ()),
        "--offload": (args.offload, False),
    }
    for field in dataclasses.fields(BilevelFlags):
        values[f"--{field.name.replace('_', '-')}"] = (getattr(args.bilevel, field.name), field.default)
    return [flag for flag, (value, default) in values.items() if value != default]


def _check_data(
    args: RunArgs, groups: list[Group], table: SelectionTable | None, described: dict[str, dict[str, Any]]
) -> None:
    """Says what the data folder and the selection files lack. Raises UserError where a run would make no sense."""
    from xl2jax.benchmarks.runner import entries, missing_line, missing_videos

    missing = missing_videos(groups)
    if missing:
        if args.strict:
            raise UserError(f"{args.data}: {missing_line(missing)}")
        logger.warning("warning: %s: %s", args.data, missing_line(missing))
    for name, task in described.items():
        bare, count = task.get("without_subtitles", 0), task["questions"]
        if bare == count:
            raise UserError(
                f"{args.data}: {name} puts subtitles into its prompts, and no question has a file of them ({{videoID}}.srt)"
            )
        if bare:
            logger.warning("warning: %s: %d of %d questions without subtitles", name, bare, count)
    for name, found in ({} if table is None else entries(groups, table)).items():
        if not any(found):
            raise UserError(f"--selection: no question of {name} has an entry in these files: are they another task's?")
        logger.info("%s: %d of %d questions have an entry in the selection files", name, sum(found), len(found))


def _present(sources: list[Path], target: Path, as_json: bool) -> int:
    """Writes the result files of a complete run and prints its scores."""
    from xl2jax.benchmarks.lmms_files import write_lmms_files
    from xl2jax.benchmarks.report import write_report
    from xl2jax.benchmarks.results import read_results, require_complete

    results = read_results(sources)
    require_complete(results, sources)
    file = write_lmms_files(target, results, datetime.datetime.now().astimezone())
    report = write_report(target, results)
    logger.info("wrote %s and %s", report, file)
    rows: list[dict[str, Any]] = []
    for r in results.tasks:
        micro = r.micro
        rows.append(
            {
                "task": r.task.name,
                "variant": r.task.variant,
                "setting": r.setting,
                "metric": r.task.metric,
                "value": r.value,
                "micro": None if micro is None else 100 * micro.score,
                "low": None if micro is None else 100 * micro.low,
                "high": None if micro is None else 100 * micro.high,
                "macro": None if r.macro is None else 100 * r.macro,
                "answered": len(r.scored),
                "left_out": len(r.unanswered),
                "not_parsed": len(r.unparsed),
            }
        )
        if r.unanswered:
            logger.warning(
                "warning: %s: %d of %d questions could not be asked and are in no score: report.md lists them",
                r.task.name, len(r.unanswered), r.questions,
            )  # fmt: skip
    if as_json:
        print(json.dumps({"tasks": rows}, ensure_ascii=False))
    else:
        print_table(rows, decimals=2)
    return 0


@dataclasses.dataclass(frozen=True)
class MergeArgs:
    """Joins the shards of a run, from one folder or several, and scores it."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the shards."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """New folder for the joined run; by default the results are written into the only folder."""
    json: bool = False
    """Prints one JSON object instead of a table."""


def merge() -> int:
    """`xl2jax eval merge`."""
    with flag_errors():
        args = tyro.cli(MergeArgs, prog="xl2jax eval merge")
    require_stdout()
    from xl2jax.benchmarks.records import answers_file, read_records, write_info
    from xl2jax.benchmarks.results import read_results, require_complete
    from xl2jax.system.atomic import replacing_folder
    from xl2jax.system.json_lines import append_line

    folders = list(args.folders)
    if not folders:
        raise UserError("nothing to merge: name the folders of the shards")
    results = read_results(folders)
    require_complete(results, folders)
    if args.output is None:
        if len(folders) > 1:
            raise UserError("several folders are joined into a new one: give it with --output")
        return _present(folders, folders[0], args.json)
    with replacing_folder(args.output) as beside:
        write_info(beside, results.info.model_copy(update={"shards": 1}))
        with open(answers_file(beside, (0, 1)), "wb", buffering=0) as out:
            for record in read_records(folders).values():
                append_line(out, record.model_dump(exclude_defaults=True))
    return _present([args.output], args.output, args.json)


@dataclasses.dataclass(frozen=True)
class CompareArgs:
    """Compares two runs question by question: agreement, McNemar's test, and which scores changed."""

    first: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    second: Annotated[Path, tyro.conf.Positional]
    """Folder of another run on the same questions."""
    json: bool = False
    """Prints one JSON object instead of a table."""


def compare() -> int:
    """`xl2jax eval compare`."""
    with flag_errors():
        args = tyro.cli(CompareArgs, prog="xl2jax eval compare")
    require_stdout()
    from xl2jax.benchmarks.compare import compare as compare_results
    from xl2jax.benchmarks.results import read_results

    comparisons = compare_results(read_results([args.first]), read_results([args.second]))
    if args.json:
        print(json.dumps({"tasks": [dataclasses.asdict(c) for c in comparisons]}, ensure_ascii=False))
        return 0
    print_table([c.row() for c in comparisons], decimals=4)
    for change in (change for c in comparisons for change in c.changes):
        print(
            f"{change.task} {change.doc_id} ({change.video}): {change.first!r} {change.first_score:g} -> "
            f"{change.second!r} {change.second_score:g}"
        )
    return 0


@dataclasses.dataclass(frozen=True)
class CheckArgs:
    """Compares prompts, paths, extractions, scores and aggregates with golden files. Exits with 0 if all agree."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of golden files, {task}__upstream.json and {task}__lmms_eval.json."""
    json: bool = False
    """Prints one JSON object instead of a table."""


def check() -> int:
    """`xl2jax eval check`. Returns 1 where a file differs."""
    with flag_errors():
        args = tyro.cli(CheckArgs, prog="xl2jax eval check")
    require_stdout()
    from xl2jax.benchmarks.golden_files import check_folder

    comparisons = list(check_folder(args.folder))
    agree = all(c.agrees for c in comparisons)
    rows = [c.row() for c in comparisons]
    if args.json:
        print(json.dumps({"agree": agree, "files": rows}, ensure_ascii=False))
    else:
        print_table(rows, decimals=3)
    return 0 if agree else 1


@dataclasses.dataclass(frozen=True)
class SyntheticArgs:
    """Writes a small data set of coloured shapes in Video-MME's layout, for the task `synthetic`."""

    folder: Annotated[Path, tyro.conf.Positional]
    """New folder."""
    videos: int = 12
    """Number of videos; every third one is short, medium or long."""
    questions: int = 3
    """Questions about each video."""
    groups: tuple[int, int, int] = (8, 24, 64)
    """Lengths of short, medium and long videos in groups (of 4 frames, 4 seconds)."""
    seed: int = 0
    """Each seed makes other videos, which the bundled model was not trained on."""


def synthetic() -> int:
    """`xl2jax eval synthetic`."""
    with flag_errors():
        args = tyro.cli(SyntheticArgs, prog="xl2jax eval synthetic")
    from xl2jax.benchmarks.synthetic import Sizes, write_synthetic
    from xl2jax.system.atomic import check_folder_target

    for name, value, low, high in (
        ("--videos", args.videos, 1, 1000),
        ("--questions", args.questions, 1, 10),
        ("--seed", args.seed, 0, 1 << 20),
        *(("--groups", groups, 6, 1 << 12) for groups in args.groups),
    ):
        require_whole(name, value, low, high)
    check_folder_target(args.folder)
    count = write_synthetic(args.folder, Sizes(args.videos, args.questions, args.groups, args.seed))
    logger.info("%s: %d questions about %d videos", args.folder, count, args.videos)
    return 0


SUBCOMMANDS: dict[str, Callable[[], int]] = {
    "merge": merge,
    "compare": compare,
    "check": check,
    "synthetic": synthetic,
}
"""Commands that the first argument names. Without one of them a benchmark is run."""


def main() -> int:
    """Runs the command and returns its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in SUBCOMMANDS:
        return run()
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    return SUBCOMMANDS[name]()
