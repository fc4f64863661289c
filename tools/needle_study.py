"""Where needles are lost: accuracy by length, clock and precision, and which layers and heads find the needle's chunk.

python tools/needle_study.py --checkpoint checkpoints/demo --json study.jsonl --plot study.png

The questions are those of `xl2jax needle`. The frames without a shape come from a bank of drawn groups and repeat, because
drawing 40,000 frames takes longer than reading them.

Each video adds a line to the JSON file as soon as its questions are answered. A run that is started again with the same file
and settings goes on with the videos that are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import xl2jax
from xl2jax.bench.setup import machine
from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, choices, require_checkpoint, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.evaluation.needle import FAMILIES, Case, NeedleConfig, make_cases, parse_modes, run_case
from xl2jax.evaluation.questions import Question
from xl2jax.evaluation.scenes import Scene, draw_frames, draw_scene, make_scene, scene_clip
from xl2jax.inference import relevance, session
from xl2jax.inference.network import Network
from xl2jax.prompt import suffix
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import start_backend
from xl2jax.system.figures import new_figure, save_figure
from xl2jax.system.json_lines import resumed_rows
from xl2jax.system.terminal import flag_errors, run_command

SIZE, BINS, BANK = 4, 10, 8  # groups of a chunk, parts of a video, scenes of 50 groups whose frames repeat


@dataclasses.dataclass(frozen=True)
class Args:
    """Accuracy and relevance by length, clock, precision, layer and head."""

    checkpoint: str = str(DEFAULT_CHECKPOINT)
    frames: str = "4096,6000,8000,10000,16000,40000"
    """Lengths of the videos in frames."""
    dense_up_to: int = 16_000
    """Frames of the longest video that is also read after dense prefill."""
    scores_up_to: int = 16_000
    """Frames of the longest video whose scores are taken by layer and head."""
    dtypes: str = "float32,bfloat16"
    """Precisions. Only the first one is also tried with four frames a second, and its scores are taken."""
    cases: int = 4
    """Videos of each length and each of three depths."""
    seed: int = 90
    json: Path = Path("study.jsonl")
    """File of JSON lines, to which results are added."""
    plot: Path = Path("study.png")
    """PNG of the accuracy, and of the scores where there are any."""


class Bank:
    """Draws a scene whose groups without a shape repeat those of a few others."""

    def __init__(self, size: int):
        scenes = [make_scene(2 * (700_000 + i) + 1, 50, events=0) for i in range(BANK)]
        drawn = np.concatenate([draw_scene(size, s) for s in scenes])
        self._size, self._groups = size, drawn.reshape(-1, FRAMES_PER_GROUP, *drawn.shape[1:])

    def draw(self, scene: Scene) -> np.ndarray:
        """uint8 [F, size, size, 3]."""
        rng = np.random.default_rng([scene.seed, 5])
        frames = self._groups[rng.integers(0, len(self._groups), scene.groups)]
        for event in scene.events:
            for group in range(event.start, event.start + event.groups):
                numbers = range(group * FRAMES_PER_GROUP, (group + 1) * FRAMES_PER_GROUP)
                frames[group] = draw_frames(self._size, scene, numbers)
        return frames.reshape(-1, *frames.shape[2:])


bank_of = functools.cache(Bank)


@functools.partial(jax.jit, static_argnames=("scorer", "groups"))
def head_scores(
    network: Network, context: Any, group: Any, text: Any, ids: Any, scorer: xl2jax.AttentionScorer, groups: int
) -> jax.Array:
    return relevance.head_scores(
        network.model.llm, context, group, text, ids, scorer, groups, attention=network.attention
    )


def scores(model: xl2jax.Model, video: Any, question: Question) -> np.ndarray:
    """The score of each chunk by each layer and head: [layers, N, blocks]."""
    network, kv = model.network, video.kv
    tokens = suffix(model.tokenizer, question.text)
    ids = session.suffix_ids(tokens.ids, tokens.first, tokens.last)
    group = session.compiled.slot_groups(kv.table, kv.cache, visual_tokens=kv.layout.visual_tokens)
    depth, rows = model.config.llm.layers, []
    for layer in range(depth):
        scorer = xl2jax.AttentionScorer(layer / depth, (layer + 1) / depth)
        text = session.new_text(network, ids, 0)
        by_group = np.asarray(head_scores(network, kv.cache, group, text, ids, scorer, kv.group_capacity))
        blocks = -(-kv.layout.groups // SIZE)
        padded = np.zeros((blocks * SIZE, by_group.shape[1]))
        padded[: kv.layout.groups] = by_group[: kv.layout.groups]
        rows.append(padded.reshape(blocks, SIZE, -1).max(1).T)
    return np.array(rows)


def score_rows(model: xl2jax.Model, case: Case, video: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """For each question of a video that has chunks without a shape in each of its parts: whether each layer, each head and all together put the needle's chunk among the best two inner
    ones, and the scores of chunks without a shape by their place, relative to their mean."""
    shown = {g // SIZE for e in case.scene.events for g in range(e.start, e.start + e.groups)}
    for question in case.questions:
        assert question.group is not None
        found, parts = question.group // SIZE, scores(model, video, question)
        inner = np.arange(1, parts.shape[-1] - 1)
        if found not in inner:
            continue

        def among_best_two(x: np.ndarray) -> bool:
            return int((x[inner] > x[found]).sum()) < 2  # noqa: B023

        together = parts.mean((0, 1)) ** (1 / 6)
        empty = np.array([b for b in inner if b not in shown], int)
        place = empty * BINS // parts.shape[-1]
        if len({*place.tolist()}) < BINS:
            continue
        by_place = [float(together[empty[place == i]].mean() / together[empty].mean()) for i in range(BINS)]
        largest = [float(together[empty[place == i]].max() / together[found]) for i in range(BINS)]
        yield {
            "frames": case.frames, "frame_seconds": seconds, "kind": question.kind, "all": among_best_two(together),
            "layers": [among_best_two(layer.mean(0)) for layer in parts],
            "heads": [[among_best_two(head) for head in layer] for layer in parts],
            "empty_by_place": by_place, "largest_empty_to_needle": largest,
        }  # fmt: skip


def parts(args: Args) -> list[tuple[str, NeedleConfig]]:
    """Precision, and one length with one clock, in the order in which they run. Raises UserError for flags out of range."""
    lengths, dtypes = whole_numbers("--frames", args.frames, FRAMES_PER_GROUP), args.dtypes.split(",")
    choices("--dtypes", args.dtypes, ("float32", "bfloat16"))
    found = []
    for dtype, frames in itertools.product(dtypes, lengths):
        modes = "dense,chunked,top2,random2" if frames <= args.dense_up_to else "chunked,top2,random2"
        for seconds in (1.0, 0.25) if dtype == dtypes[0] else (1.0,):
            config = NeedleConfig(
                (frames,), (0.2, 0.5, 0.8), args.cases, parse_modes(modes), seed=args.seed, frame_seconds=seconds
            )
            found.append((dtype, config))
    return found


def part_of(row: dict[str, Any]) -> tuple[str, int, float]:
    """The precision, length and clock of a video's results."""
    return row["dtype"], row["frames"], row["frame_seconds"]


def run(
    model: xl2jax.Model, dtype: str, config: NeedleConfig, cases: Sequence[Case], scored: bool
) -> Iterator[dict[str, Any]]:
    """The results of each video, and the scores of its questions where they are taken."""
    bank, seconds = bank_of(model.config.vision.image_size), config.frame_seconds
    for case in cases:
        drawn = bank.draw(case.scene)
        results = [dataclasses.asdict(result) for result in run_case(model, case, config, drawn)]
        scores = []
        if scored:
            clip = scene_clip(case.scene, FRAMES_PER_GROUP * seconds, drawn)
            scores = list(score_rows(model, case, model.watch(clip, bilevel=None), seconds))
        yield {
            "dtype": dtype, "frames": case.frames, "frame_seconds": seconds, "seed": case.scene.seed,
            "results": results, "scores": scores,
        }  # fmt: skip


def main() -> None:
    with flag_errors():
        args = tyro.cli(Args, prog="python tools/needle_study.py")
    todo = parts(args)
    check_file_target(args.plot)
    require_checkpoint(args.checkpoint)
    stored_config(find_checkpoint(args.checkpoint))
    start_backend()
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("json", "plot")}
    settings |= {"checkpoint": Path(args.checkpoint).name, "machine": machine()}
    first = todo[0][0]
    with resumed_rows(args.json, settings) as (rows, add):
        for dtype, configs in itertools.groupby(todo, lambda part: part[0]):
            model = None
            for _, config in configs:
                ((frames,), seconds) = config.frames, config.frame_seconds
                part = (dtype, frames, seconds)
                done = {row["seed"] for row in rows if part_of(row) == part}
                missing = [case for case in make_cases(config) if case.scene.seed not in done]
                if missing:
                    model = model or xl2jax.load(args.checkpoint, dtype=dtype)
                    for row in run(model, dtype, config, missing, dtype == first and frames <= args.scores_up_to):
                        add(row)
                results = [r for row in rows if part_of(row) == part for r in row["results"]]
                print(f"{frames} frames, {seconds} s a frame, {dtype}: {accuracies(results)}", flush=True)
    plot(args.plot, [row for row in rows if row["dtype"] == first])


def accuracies(results: list[dict[str, Any]]) -> str:
    """The share of right answers in each mode by family, and of needles whose chunk was chosen."""
    cells = []
    for mode in dict.fromkeys(r["mode"] for r in results):
        for family in ("by_content", "by_time"):
            part = [r for r in results if r["mode"] == mode and r["kind"] in FAMILIES[family]]
            chosen = [r["selected"] for r in part if r["selected"] is not None]
            recall = f" ({np.mean(chosen):.0%} chosen)" if chosen and mode != "chunked" else ""
            cells.append(
                f"{mode} {family.replace('_', ' ')} {np.mean([r['correct'] for r in part]):.0%} of {len(part)}{recall}"
            )
    return ", ".join(cells)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy by length, the scores of empty chunks by distance, and which heads find the needle's chunk."""
    results = [{**r, "frame_seconds": row["frame_seconds"]} for row in rows for r in row["results"]]
    scored = [score for row in rows for score in row["scores"]]
    figure = new_figure(15, 4.2)
    left, middle, right = figure.subplots(1, 3)
    for family, style in (("by_content", "-"), ("by_time", "--")):
        for mode, colour in (("dense", "C0"), ("chunked", "C1"), ("top2", "C2")):
            for seconds, marker in ((1.0, "o"), (0.25, "x")):
                kept = [
                    r for r in results
                    if (r["mode"], r["frame_seconds"]) == (mode, seconds) and r["kind"] in FAMILIES[family]
                ]  # fmt: skip
                if not kept:
                    continue
                lengths = sorted({r["frames"] for r in kept})
                means = [np.mean([r["correct"] for r in kept if r["frames"] == n]) for n in lengths]
                label = f"{mode}, {family.replace('_', ' ')}, {seconds:g} s a frame"
                left.plot(lengths, means, style, color=colour, marker=marker, label=label)
    left.set(xscale="log", xlabel="frames", ylabel="accuracy", ylim=(-0.02, 1.02), title="accuracy")
    left.legend(fontsize=6, loc="lower left")
    if scored:
        plot_scores(figure, middle, right, scored)
    else:
        print("no scores were taken of videos this short or long: the picture has the accuracy alone", file=sys.stderr)
        middle.set_axis_off()
        right.set_axis_off()
    save_figure(figure, path)


def plot_scores(figure: Any, middle: Any, right: Any, scored: list[dict[str, Any]]) -> None:
    for frames in sorted({r["frames"] for r in scored}):
        mean = np.mean([r["empty_by_place"] for r in scored if r["frames"] == frames], axis=0)
        behind = frames * (1 - (np.arange(BINS) + 0.5) / BINS)
        middle.plot(behind, mean, marker="o", label=f"{frames} frames")
    middle.set(xscale="log", xlabel="frames between the chunk and the question", ylabel="score relative to the mean")
    middle.set(title="chunks without a shape")
    middle.legend(fontsize=7)
    heads = np.mean([r["heads"] for r in scored], axis=0)
    image = right.imshow(heads, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(heads):
        right.text(j, i, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.6 else "black")
    right.set(
        xticks=range(heads.shape[1]), xlabel="head", ylabel="layer", title="needle's chunk among this head's best two"
    )
    figure.colorbar(image, ax=right)


if __name__ == "__main__":
    run_command(main)
