"""A case of `verify`: inputs and expected tensors of upstream, and the model that is compared with them.

Everything behind the vision tower runs through `xl2jax.inference.session`, and so through the compiled programs that
answer questions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.checkpoint.params import ParamReader
from xl2jax.config import FRAMES_PER_GROUP, Weights
from xl2jax.errors import UserError
from xl2jax.inference import compiled, session
from xl2jax.inference.cache import KVCache
from xl2jax.inference.decoding import answer_tokens
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.network import Network
from xl2jax.inference.prefill import PrefillPlan, Stretch, make_plan
from xl2jax.models.dts import resample
from xl2jax.models.param_tree import cast
from xl2jax.models.sharding import head_copies, with_head_copies
from xl2jax.models.video_xl2 import pad_to_groups

VIDEO_ID = -200
"""Stands for the video in `input_ids`."""
_FRAMES_AT_ONCE = 16


def case_pixels(frames: int, size: int) -> np.ndarray:
    """The frames of all cases, which a formula defines instead of a file: float32 [F, H, W, 3]."""
    f, y, x, c = np.ogrid[:frames, :size, :size, :3]
    value = np.sin(0.05 * (c + 1) * x + 0.03 * y + 0.4 * f) * np.cos(0.02 * (f + 1) * y - 0.3 * c)
    return value.astype(np.float32)


class Case:
    """A case folder, and the model loaded from its checkpoint through the real converter."""

    def __init__(
        self,
        folder: Path,
        converted: Path,
        *,
        dtype: str = "float32",
        quantized: bool = False,
        weights: Weights | None = None,
        mesh: Mesh | None = None,
    ):
        """`mesh`: the devices that the model is split over."""
        self.folder, self.quantized, self.dtype = folder, quantized, dtype
        if not (folder / "case.json").is_file():
            raise UserError(f"{folder}: not a case folder (no case.json)")
        torch_to_orbax(folder / "checkpoint", converted, "float32", weights)
        reader = ParamReader(converted)
        copies = 1 if mesh is None else head_copies(reader.config, mesh.size)
        self.config = with_head_copies(reader.config, copies)
        params = reader.load() if mesh is None else reader.load_split([mesh], head_copies=copies)[0]
        self.network = Network.create(self.config, cast(params, dtype), mesh=mesh, head_copies=copies)
        inputs = self._tensors(folder / "inputs.safetensors")
        try:
            self.case: dict[str, Any] = json.loads((folder / "case.json").read_text())
            self.frames, self.new_tokens = int(self.case["frames"]), int(self.case["new_tokens"])
            self.times = tuple(int(n) for n in self.case["time_token_lengths"])
            ids, group_ids = inputs["input_ids"].tolist(), inputs["group_ids"].tolist()
        except (KeyError, ValueError, TypeError) as e:
            raise UserError(f"{folder}: case.json or inputs.safetensors is not complete ({e})") from None
        if ids.count(VIDEO_ID) != 1:
            raise UserError(f"{folder / 'inputs.safetensors'}: input_ids must hold {VIDEO_ID} once")
        split = ids.index(VIDEO_ID)
        self.prefix, self.suffix = ids[:split], ids[split + 1 :]
        self.time_ids = _time_ids(group_ids, self.times, self.config.visual_tokens, folder)
        self.layout = VideoLayout(len(self.prefix), self.times, self.config.visual_tokens)

    @staticmethod
    def _tensors(path: Path) -> dict[str, np.ndarray]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None

    def expected(self, section: str) -> dict[str, np.ndarray] | None:
        path = self.folder / "expected" / f"{section}.safetensors"
        return self._tensors(path) if path.is_file() else None

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """The frames, padded to whole groups: float32 [F, H, W, 3] in [-1, 1]."""
        return np.asarray(pad_to_groups(jnp.asarray(case_pixels(self.frames, self.config.vision.image_size))))

    @functools.cached_property
    def stages(self) -> dict[str, np.ndarray]:
        """Every vision stage in upstream's layout, computed a few frames at a time.

        The last of them, the visual tokens, come from the compiled program that answers questions use.
        """

        @compiled.program
        def encode(network: Network, pixels: jax.Array) -> dict[str, jax.Array]:
            model = network.model
            features = model.vision(pixels)
            interpolated = resample(features, self.config.grid)
            groups = model.dts(interpolated)
            projected = model.projector(groups)
            return {
                "vision_features": features,
                "interpolated": interpolated,
                "dts": groups.transpose(0, 3, 1, 2),
                "projected": projected.reshape(len(projected), -1, projected.shape[-1]),
            }

        parts = [
            jax.device_get(encode(self.network, self.pixels[i : i + _FRAMES_AT_ONCE]))
            for i in range(0, len(self.pixels), _FRAMES_AT_ONCE)
        ]
        stages = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        stages["visual_tokens"] = stages["visual_tokens_e2e"] = self.visual_tokens()
        return {k: x[: self.frames] if k in ("vision_features", "interpolated") else x for k, x in stages.items()}

    def visual_tokens(self) -> np.ndarray:
        """Visual tokens [G, V, D] by the compiled program."""
        return np.concatenate([np.asarray(visual) for visual in self._visual])[: self.layout.groups]

    @functools.cached_property
    def _visual(self) -> list[jax.Array]:
        """Visual tokens of each segment, [segment_groups, V, D]. They are the same whatever the prefill settings."""
        plan = make_plan(self.layout, PrefillConfig(), self.network.platform)
        frames = plan.segment_groups * FRAMES_PER_GROUP
        return [
            session.encode(self.network, plan, self.pixels[first : first + frames])
            for first in range(0, len(self.pixels), frames)
        ]

    def prefill(self, config: PrefillConfig) -> tuple[session.VideoKV, np.ndarray]:
        """The video's KV, and hidden states [N without suffix, D] in natural order."""
        plan = make_plan(self.layout, config, self.network.platform)
        video = session.VideoPrefill(
            self.network, self.layout, plan, self.prefix, self.time_ids, quantized=self.quantized, keep_hidden=True
        )
        return prefilled(video, plan, self._visual)

    def answer(self, context: KVCache) -> Reply:
        """Runs the suffix behind `context` and decodes a greedy answer."""
        return greedy_reply(self.network, context, self.suffix, self.new_tokens)

    def single_heads(self, kv: np.ndarray) -> np.ndarray:
        """Keys or values [L, K, ...] without the copies of heads that are on several devices."""
        return kv[:, :: self.network.head_copies]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return np.asarray(token_logits(self.network, hidden))


def prefilled(
    video: session.VideoPrefill, plan: PrefillPlan, visual: Sequence[jax.Array], tail: Stretch | None = None
) -> tuple[session.VideoKV, np.ndarray]:
    """Prefills the visual tokens of all segments, and the tail. The KV, and hidden states [N, D] in natural order.

    `video` keeps hidden states.
    """
    prefix = np.concatenate(video.hidden)
    hidden = np.zeros((video.layout.tokens, prefix.shape[1]), prefix.dtype)
    hidden[: len(prefix)] = prefix
    visuals = plan.step_groups * plan.visual_tokens
    for segment in visual:
        steps, outputs = video.add(segment)
        states = np.asarray(outputs)
        for i in range(plan.segment_steps):
            spans = ((0, int(steps.visuals[i])), (visuals, visuals + int(steps.times[i])))
            for first, last in spans:
                hidden[steps.position[i, first:last]] = states[i, first:last]
    if tail is not None and len(tail.ids):
        video.add_globals(tail)
        hidden[len(hidden) - len(tail.ids) :] = np.concatenate(video.hidden)[len(prefix) :]
    return video.finish(), hidden


def greedy_reply(network: Network, context: KVCache, suffix: Sequence[int], new_tokens: int) -> Reply:
    """Runs a suffix behind `context` and decodes a greedy answer."""
    n, stop, greedy = len(suffix), np.array([-1], np.int32), TokenSampling()
    ids = session.suffix_ids(suffix, 0, n)
    state, hidden = session.start_answer(network, context, ids, new_tokens=new_tokens, stop=stop, sampling=greedy)
    # Decoding donates the state, so its arrays are copied before.
    k, v = (np.asarray(x)[:, :: network.head_copies, :n] for x in (state.text.k, state.text.v))
    *_, answer = answer_tokens(network, context, state, new_tokens=new_tokens, stop=stop, sampling=greedy)
    return Reply(k, v, np.asarray(hidden)[:n], np.asarray(answer))


class Reply(NamedTuple):
    """The suffix's keys and values [L, K, n, H], its hidden states [n, D], and the ids of the answer."""

    k: np.ndarray
    v: np.ndarray
    hidden: np.ndarray
    ids: np.ndarray


@compiled.program
def token_logits(network: Network, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., D] -> logits [..., vocab], float32."""
    return network.model.llm.logits(hidden)


def _time_ids(group_ids: list[int], times: tuple[int, ...], visual: int, folder: Path) -> list[list[int]]:
    if len(group_ids) != sum(times) + visual * len(times):
        raise UserError(f"{folder}: group_ids do not match time_token_lengths and the model's {visual} tokens a group")
    time_ids, start = [], 0
    for n in times:
        time_ids.append([int(i) for i in group_ids[start : start + n]])
        start += n + visual
    return time_ids
