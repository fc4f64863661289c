"""Where needles are lost: accuracy by length, clock and precision, and which layers and heads find the needle's chunk.

python tools/needle_study.py --checkpoint checkpoints/demo --json study.json --plot study.png

The questions are those of `xl2jax needle`. The frames without a shape come from a bank of drawn groups and repeat, because
drawing 40,000 frames takes longer than reading them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import xl2jax
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.evaluation.needle import FAMILIES, Case, NeedleConfig, make_cases, parse_modes, run_case
from xl2jax.evaluation.questions import Question
from xl2jax.evaluation.scenes import Scene, draw_frames, draw_scene, make_scene, scene_clip
from xl2jax.inference import relevance, session
from xl2jax.inference.network import Network
from xl2jax.prompt import suffix
from xl2jax.system.figures import new_figure, save_figure

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
    json: Path = Path("study.json")
    plot: Path = Path("study.png")


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
    """For each question: whether each layer, each head and all together put the needle's chunk among the best two inner
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


def main() -> None:
    args = tyro.cli(Args)
    lengths = whole_numbers("--frames", args.frames, FRAMES_PER_GROUP)
    bank, results, scored = None, [], []
    first, *_ = dtypes = args.dtypes.split(",")
    for dtype in dtypes:
        clocks = (1.0, 0.25) if dtype == first else (1.0,)
        model = xl2jax.load(args.checkpoint, dtype=dtype)
        bank = bank or Bank(model.config.vision.image_size)
        for frames in lengths:
            for seconds in clocks:
                modes = "dense,chunked,top2,random2" if frames <= args.dense_up_to else "chunked,top2,random2"
                config = NeedleConfig(
                    (frames,), (0.2, 0.5, 0.8), args.cases, parse_modes(modes), seed=args.seed, frame_seconds=seconds
                )
                for case in make_cases(config):
                    drawn = bank.draw(case.scene)
                    for result in run_case(model, case, config, drawn):
                        results.append({"dtype": dtype, "frame_seconds": seconds, **dataclasses.asdict(result)})
                    if dtype == first and frames <= args.scores_up_to and case.scene.seed % 4 == 1:
                        clip = scene_clip(case.scene, FRAMES_PER_GROUP * seconds, drawn)
                        scored += score_rows(model, case, model.watch(clip, bilevel=None), seconds)
                    args.json.write_text(json.dumps({"results": results, "scores": scored}))
                report(results, dtype, frames, seconds)
    plot(args.plot, [r for r in results if r["dtype"] == first], scored)


def report(results: list[dict[str, Any]], dtype: str, frames: int, seconds: float) -> None:
    rows = [r for r in results if (r["dtype"], r["frames"], r["frame_seconds"]) == (dtype, frames, seconds)]
    cells = []
    for mode in dict.fromkeys(r["mode"] for r in rows):
        for family in ("by_content", "by_time"):
            part = [r for r in rows if r["mode"] == mode and r["kind"] in FAMILIES[family]]
            chosen = [r["selected"] for r in part if r["selected"] is not None]
            recall = f" ({np.mean(chosen):.0%} chosen)" if chosen and mode != "chunked" else ""
            cells.append(f"{mode} {family[3:]} {np.mean([r['correct'] for r in part]):.0%} of {len(part)}{recall}")
    print(f"{frames} frames, {seconds} s a frame, {dtype}: " + ", ".join(cells), flush=True)


def plot(path: Path, results: list[dict[str, Any]], scored: list[dict[str, Any]]) -> None:
    """Accuracy by length, the scores of empty chunks by distance, and which heads find the needle's chunk."""
    if not scored:
        return
    figure = new_figure(15, 4.2)
    left, middle, right = figure.subplots(1, 3)
    for family, style in (("by_content", "-"), ("by_time", "--")):
        for mode, colour in (("dense", "C0"), ("chunked", "C1"), ("top2", "C2")):
            for seconds, marker in ((1.0, "o"), (0.25, "x")):
                kept = [
                    r for r in results
                    if (r["mode"], r["frame_seconds"]) == (mode, seconds) and r["kind"] in FAMILIES[family]
                ]  # fmt: skip
                lengths = sorted({r["frames"] for r in kept})
                means = [np.mean([r["correct"] for r in kept if r["frames"] == n]) for n in lengths]
                label = f"{mode}, {family.replace('_', ' ')}, {seconds:g} s a frame"
                left.plot(lengths, means, style, color=colour, marker=marker, label=label)
    left.set(xscale="log", xlabel="frames", ylabel="accuracy", ylim=(-0.02, 1.02), title="accuracy")
    left.legend(fontsize=6, loc="lower left")
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
    save_figure(figure, path)


if __name__ == "__main__":
    main()
