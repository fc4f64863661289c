"""Compares pictures with upstream's outputs (`xl2jax verify`): tiles, stages, prompts, losses and gradients.

A case folder of pictures holds checkpoint/, pictures/*.png, case.json, expected/ in float32 and, for what it holds,
expected64/ in float64. Prompts go through the programs that answer questions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.checkpoint.params import load_params
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.case import VIDEO_ID, case_pixels, greedy_reply, prefilled, token_logits
from xl2jax.evaluation.verify import LIMITS, Row, compare, gradient_rows
from xl2jax.inference import compiled, session
from xl2jax.inference.layout import PrefillConfig, VideoLayout, bucket
from xl2jax.inference.network import Network
from xl2jax.inference.pictures import joined
from xl2jax.inference.prefill import make_plan
from xl2jax.models.dts import resample
from xl2jax.models.param_tree import cast
from xl2jax.models.video_xl2 import normalise, pad_to_groups
from xl2jax.training.loss import IGNORE, TokenBatch, token_loss
from xl2jax.video.image_files import padded_to_square
from xl2jax.video.pictures import cut
from xl2jax.video.read_ahead import resize


def is_picture_case(folder: Path) -> bool:
    """Whether a case folder holds pictures. Raises UserError where it has no case.json."""
    return "prompts" in _json(folder / "case.json")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


class PictureCase:
    """A case folder of pictures, and the model loaded from its checkpoint through the real converter."""

    def __init__(self, folder: Path, converted: Path, dtype: str):
        self.folder, self.dtype = folder, dtype
        torch_to_orbax(folder / "checkpoint", converted, "float32")
        self.config, params = load_params(converted)
        self.network = Network.create(self.config, cast(params, dtype))
        self.case = _json(folder / "case.json")
        self.size = self.config.vision.image_size
        self._codes = self.tensors("preprocess", "expected")["pixel_of_code"]

    def tensors(self, name: str, where: str) -> dict[str, np.ndarray]:
        path = self.folder / where / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None

    @property
    def expected(self) -> str:
        """The folder of tensors of the dtype in which this case is computed."""
        return "expected64" if self.dtype == "float64" else "expected"

    @functools.cache  # noqa: B019 (one case a run)
    def picture(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self.folder / "pictures" / f"{name}.png").convert("RGB"))

    def tiles(self, name: str) -> np.ndarray:
        return cut(self.picture(name), self.size, self.config.grids())

    def views(self, name: str) -> np.ndarray:
        """The tiles behind the view of the whole picture, which upstream encodes and then drops."""
        return np.concatenate([resize(self.picture(name), self.size)[None], self.tiles(name)])

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """What the tower is given: uint8, as in answers, or in float64 the numbers of upstream's float32."""
        return self._codes[images].astype(np.float64) if self.dtype == "float64" else images


def preprocess_rows(case: PictureCase) -> Iterator[Row]:
    step = int(case.case["views_step"])
    for name, tensor in case.tensors("preprocess", "expected").items():
        picture, _, kind = name.rpartition("_")
        if kind == "views":
            actual = case.views(picture).transpose(0, 3, 1, 2)[..., ::step, ::step]
        elif kind == "square":
            actual = resize(padded_to_square(case.picture(picture)), case.size).transpose(2, 0, 1)[..., ::step, ::step]
        else:
            actual = np.asarray(normalise(jnp.arange(256, dtype=jnp.uint8)), np.float32)
        yield compare(name, tensor, actual, None, limit=1e-6)


@compiled.program
def _stages(network: Network, pixels: jax.Array) -> dict[str, jax.Array]:
    """Every vision stage of some views, in upstream's layout."""
    model = network.model
    features = model.vision(normalise(pixels) if pixels.dtype == jnp.uint8 else pixels)
    interpolated = resample(features, network.config.grid)
    groups = model.dts(jnp.repeat(interpolated, FRAMES_PER_GROUP, axis=0))
    projected = model.projector(groups)
    return {
        "vision_features": features,
        "interpolated": interpolated,
        "dts": groups.transpose(0, 3, 1, 2),
        "projected": projected.reshape(len(projected), -1, projected.shape[-1]),
    }


def _encoded(case: PictureCase, images: np.ndarray, *, pool: int = 2) -> np.ndarray:
    """Visual tokens of tiles by the compiled program, [n * tokens of a tile, D]."""
    encoded = session.TileTokens(case.network, len(images), pool=pool)
    encoded.add(case.pixels(images))
    return np.asarray(encoded.tokens)[: len(images) * (case.config.grid // pool) ** 2]


def dense_rows(case: PictureCase) -> Iterator[Row]:
    expected = case.tensors("dense", case.expected)
    limit = LIMITS[case.dtype].forward
    prompts = {prompt["name"]: prompt for prompt in case.case["prompts"]}
    for name in case.case["pictures"]:
        stages = jax.device_get(_stages(case.network, case.pixels(case.views(name))))
        stages["visual_tokens"] = _encoded(case, case.tiles(name))
        for stage, actual in stages.items():
            if (tensor := expected.pop(f"{name}_{stage}", None)) is not None:
                yield compare(f"{name}_{stage}", tensor, actual[: len(tensor)], None, limit=limit)
    for name, prompt in prompts.items():
        actual = _prompt(case, prompt)
        for part in ("inputs_embeds", "logits", "generated"):
            if (tensor := expected.pop(f"{name}_{part}", None)) is not None:
                yield compare(f"{name}_{part}", tensor, actual[part][-len(tensor) :], None, limit=limit)
    if expected:
        raise UserError(f"{case.folder}: dense.safetensors holds unknown tensors: {', '.join(sorted(expected))}")


def _prompt(case: PictureCase, prompt: dict[str, Any]) -> dict[str, np.ndarray]:
    """The embeddings, logits and greedy ids of a prompt: its visuals in the order of their places."""
    ids, pad = prompt["input_ids"], case.case["tokenizer"]["pad_token_id"]
    places = [i for i, token in enumerate(ids) if token == VIDEO_ID]
    pieces = [ids[a:b] for a, b in zip([0, *(i + 1 for i in places)], [*places, len(ids)], strict=True)]
    order = ["video"] if prompt.get("as_frames") else prompt.get("order", ["image"] * len(places))
    names, seen = iter(prompt["pictures"]), 0
    before: list[list[int] | int] = []
    after: list[list[int] | int] = []
    rows: list[np.ndarray] = []
    side, frames = before, np.zeros(0)
    for kind, piece in zip(order, pieces, strict=False):
        side.append(piece)
        if kind == "image":
            name = next(names)
            single = prompt.get("single_view", False)
            rows.append(_encoded(case, case.views(name)[:1], pool=1) if single else _encoded(case, case.tiles(name)))
            side.append(len(rows[-1]))
            seen += len(rows[-1]) if side is before else 0
            continue
        side = after
        if prompt.get("as_frames"):
            squares = np.stack([resize(padded_to_square(case.picture(n)), case.size) for n in prompt["pictures"]])
            frames = case.pixels(np.asarray(pad_to_groups(jnp.asarray(squares))))
        else:
            frames = case_pixels(prompt["video"]["frames"], case.size).astype(case.dtype)
    times = _times(prompt.get("group_ids", []), pad)
    prefix, tail = joined(before), joined(after, first=seen)
    pictures = jnp.asarray(np.concatenate(rows)) if rows else None
    layout = VideoLayout(len(prefix.ids), tuple(map(len, times)), case.config.visual_tokens, len(tail.ids))
    plan = make_plan(layout, PrefillConfig(window_chunks=None), case.network.platform)
    video = session.VideoPrefill(case.network, layout, plan, prefix, times, pictures=pictures, keep_hidden=True)
    size = plan.segment_groups * FRAMES_PER_GROUP
    segments = [session.encode(case.network, plan, frames[i : i + size]) for i in range(0, len(frames), size)]
    kv, hidden = prefilled(video, plan, segments, tail)
    reply = greedy_reply(case.network, kv.cache, pieces[-1], int(case.case["new_tokens"]))
    embed = np.asarray(case.network.model.llm.embed_tokens(jnp.arange(case.config.llm.vocab)))

    def embedded(stretch: Any) -> np.ndarray:
        out = embed[stretch.ids]
        if rows:
            out = np.where((stretch.visual >= 0)[:, None], np.asarray(pictures)[np.maximum(stretch.visual, 0)], out)
        return out

    groups = [group for segment in segments for group in np.asarray(segment)][: layout.groups]
    video_parts = [x for ids, visual in zip(times, groups, strict=True) for x in (embed[ids], visual)]
    return {
        "inputs_embeds": np.concatenate([embedded(prefix), *video_parts, embedded(tail), embed[pieces[-1]]]),
        "logits": np.asarray(token_logits(case.network, np.concatenate([hidden, reply.hidden]))),
        "generated": reply.ids,
    }


def _times(group_ids: Sequence[int], pad: int) -> list[list[int]]:
    """The time tokens of each group: what stands between the visual tokens."""
    times: list[list[int]] = []
    before = pad
    for token in group_ids:
        if token != pad:
            if before == pad:
                times.append([])
            times[-1].append(token)
        before = token
    return times


def train_rows(case: PictureCase) -> Iterator[Row]:
    """Merged labels, losses and gradients of all batches."""
    path = case.folder / case.expected / "train.json"
    stored = _json(path)
    whole = case.tensors("train_grads", case.expected)
    # All batches are padded to one shape, so that few programs are compiled.
    length = max(len(row) for batch in stored["batches"] for row in batch["merged_labels"])
    for number, batch in enumerate(stored["batches"]):
        name = f"{'+'.join(batch['samples'])}{' cut at ' * ('model_max_length' in batch)}{batch.get('model_max_length', '')}: "
        samples, labels = [stored["samples"][s] for s in batch["samples"]], np.asarray(batch["merged_labels"])
        tiles, tokens = _batch(case, samples, batch.get("model_max_length"), length)
        yield compare(f"{name}labels", labels, np.asarray(tokens.labels)[:, : labels.shape[1]], None, limit=0)
        loss, gradients = _loss_and_gradients(case.network, tiles, tokens)
        both = np.array([batch["loss"]]), np.asarray(loss)[None]
        yield compare(f"{name}loss", *both, None, limit=LIMITS[case.dtype].loss)
        norm, norms = float(batch["global_grad_norm"]), batch.get("grad_norms", {})
        yield from gradient_rows(case.network, gradients, path, norm, norms, {} if number else whole, name)


@compiled.program
@functools.partial(jax.value_and_grad, argnums=0)
def _loss_and_gradients(network: Network, tiles: jax.Array, tokens: TokenBatch) -> jax.Array:
    pixels = normalise(tiles) if tiles.dtype == jnp.uint8 else tiles
    total, count = token_loss(network.model, pixels[:, :0], tokens, pixels, remat=True)
    return total / count


def _batch(
    case: PictureCase, samples: Sequence[dict[str, Any]], limit: int | None, length: int
) -> tuple[jax.Array, TokenBatch]:
    """The tiles and tokens of a batch, from upstream's ids and labels before pictures are merged into them.

    `limit`: upstream's model_max_length. `length`: what rows are padded to.
    """
    tile_tokens = case.config.tile_tokens
    tiles: list[np.ndarray] = []
    rows = []
    for sample in samples:
        files = sample.get("image", [])
        pictures = [case.tiles(Path(f).stem) for f in ([files] if isinstance(files, str) else files)]
        tiles.append(np.concatenate([*pictures, np.zeros((0, case.size, case.size, 3), np.uint8)]))
        counts, first = iter(pictures), 0
        ids, visual, labels = [], [], []  # type: ignore[var-annotated]
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
            n = len(next(counts)) * tile_tokens if token == VIDEO_ID else 1
            visual += range(first, first + n) if token == VIDEO_ID else [-1]
            ids += [0] * n if token == VIDEO_ID else [token]
            labels += [IGNORE] * n if token == VIDEO_ID else [label]
            first += n if token == VIDEO_ID else 0
        rows.append(tuple(x[:limit] for x in (ids, visual, labels)))
    most = bucket(max(map(len, tiles)), 8)
    columns = [
        jnp.asarray([row[i] + [fill] * (length - len(row[i])) for row in rows], jnp.int32)
        for i, fill in enumerate((0, -1, IGNORE))
    ]
    padded = [np.pad(t, ((0, most - len(t)), (0, 0), (0, 0), (0, 0))) for t in tiles]
    return jnp.asarray(case.pixels(np.stack(padded))), TokenBatch(*columns)


def verify_pictures(folder: Path, sections: Sequence[str], converted: Path, *, dtype: str) -> Iterator[Row]:
    """Compares the sections "dense" and "train" of a case of pictures. Yields a row for each tensor."""
    case = PictureCase(folder, converted, dtype)
    if "dense" in sections:
        yield from preprocess_rows(case)
        yield from dense_rows(case)
    if "train" in sections:
        yield from train_rows(case)
