"""The conversion table between the parameter names of upstream's PyTorch model and of this model."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xl2jax.config import VideoXL2Config
from xl2jax.models.param_tree import flatten, is_quantized
from xl2jax.models.video_xl2 import abstract_model

type Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts a PyTorch array to the layout of this model, and back. Both directions only permute axes, bit by bit."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, VideoXL2Config], np.ndarray]


SAME = Transform(lambda x: x, lambda x, _: x)
LINEAR = Transform(lambda x: x.T, lambda x, _: x.T)  # [out, in] <-> [in, out]
CONV1D = Transform(lambda x: x[:, :, 0].T, lambda x, _: x.T[:, :, None])
CONV3D_POINT = Transform(lambda x: x[:, :, 0, 0, 0].T, lambda x, _: x.T[:, :, None, None, None])
CONV3D = Transform(
    lambda x: einops.rearrange(x, "o i t h w -> t h w i o"),
    lambda x, _: einops.rearrange(x, "t h w i o -> o i t h w"),
)
PATCH = Transform(
    lambda x: einops.rearrange(x, "o c p q -> (p q c) o"),
    lambda x, config: einops.rearrange(
        x, "(p q c) o -> o c p q", p=config.vision.patch_size, q=config.vision.patch_size
    ),
)

_VISION = "model.vision_tower.vision_tower.vision_model"
_SAE = "model.sae"
_LLM = "model.layers.{i}"

# (dotted name, upstream's name, values of {x}, transform). {i} is a layer, and {s} a DTS stage, whose three modules
# upstream numbers {s0} = 3s, {s1} = 3s + 1 and {s2} = 3s + 2.
_TABLE: tuple[tuple[str, str, tuple[str, ...], Transform], ...] = (
    ("vision.patch_embedding.kernel", f"{_VISION}.embeddings.patch_embedding.weight", (), PATCH),
    ("vision.patch_embedding.bias", f"{_VISION}.embeddings.patch_embedding.bias", (), SAME),
    ("vision.position_embedding.embedding", f"{_VISION}.embeddings.position_embedding.weight", (), SAME),
    ("vision.layers.{i}.norm{x}.scale", f"{_VISION}.encoder.layers.{{i}}.layer_norm{{x}}.weight", ("1", "2"), SAME),
    ("vision.layers.{i}.norm{x}.bias", f"{_VISION}.encoder.layers.{{i}}.layer_norm{{x}}.bias", ("1", "2"), SAME),
    ("vision.layers.{i}.{x}.kernel", f"{_VISION}.encoder.layers.{{i}}.self_attn.{{x}}_proj.weight", ("q", "k", "v", "out"), LINEAR),
    ("vision.layers.{i}.{x}.bias", f"{_VISION}.encoder.layers.{{i}}.self_attn.{{x}}_proj.bias", ("q", "k", "v", "out"), SAME),
    ("vision.layers.{i}.fc{x}.kernel", f"{_VISION}.encoder.layers.{{i}}.mlp.fc{{x}}.weight", ("1", "2"), LINEAR),
    ("vision.layers.{i}.fc{x}.bias", f"{_VISION}.encoder.layers.{{i}}.mlp.fc{{x}}.bias", ("1", "2"), SAME),
    ("dts.temporal_encoding", f"{_SAE}.temporal_encoding", (), SAME),
    ("dts.stages.{s}.spatial.norm.scale", f"{_SAE}.encoder.{{s0}}.norm.weight", (), SAME),
    ("dts.stages.{s}.spatial.norm.bias", f"{_SAE}.encoder.{{s0}}.norm.bias", (), SAME),
    ("dts.stages.{s}.spatial.{x}.kernel", f"{_SAE}.encoder.{{s0}}.{{x}}.weight", ("q", "k", "v", "proj_out"), CONV3D_POINT),
    ("dts.stages.{s}.spatial.{x}.bias", f"{_SAE}.encoder.{{s0}}.{{x}}.bias", ("q", "k", "v", "proj_out"), SAME),
    ("dts.stages.{s}.temporal.norm.scale", f"{_SAE}.encoder.{{s1}}.norm.weight", (), SAME),
    ("dts.stages.{s}.temporal.norm.bias", f"{_SAE}.encoder.{{s1}}.norm.bias", (), SAME),
    ("dts.stages.{s}.temporal.{x}.kernel", f"{_SAE}.encoder.{{s1}}.{{x}}.weight", ("qkv", "proj_out"), CONV1D),
    ("dts.stages.{s}.temporal.{x}.bias", f"{_SAE}.encoder.{{s1}}.{{x}}.bias", ("qkv", "proj_out"), SAME),
    ("dts.stages.{s}.temporal.relative_position_{x}.embedding", f"{_SAE}.encoder.{{s1}}.relative_position_{{x}}.embeddings_table", ("k", "v"), SAME),
    ("dts.stages.{s}.down.conv.kernel", f"{_SAE}.encoder.{{s2}}.conv.weight", (), CONV3D),
    ("dts.stages.{s}.down.conv.bias", f"{_SAE}.encoder.{{s2}}.conv.bias", (), SAME),
    ("projector.fc1.kernel", "model.mm_projector.0.weight", (), LINEAR),
    ("projector.fc1.bias", "model.mm_projector.0.bias", (), SAME),
    ("projector.fc2.kernel", "model.mm_projector.2.weight", (), LINEAR),
    ("projector.fc2.bias", "model.mm_projector.2.bias", (), SAME),
    ("llm.embed.embedding", "model.embed_tokens.weight", (), SAME),
    ("llm.layers.{i}.input_norm.scale", f"{_LLM}.input_layernorm.weight", (), SAME),
    ("llm.layers.{i}.post_attention_norm.scale", f"{_LLM}.post_attention_layernorm.weight", (), SAME),
    ("llm.layers.{i}.{x}.kernel", f"{_LLM}.self_attn.{{x}}_proj.weight", ("q", "k", "v", "o"), LINEAR),
    ("llm.layers.{i}.{x}.bias", f"{_LLM}.self_attn.{{x}}_proj.bias", ("q", "k", "v"), SAME),
    ("llm.layers.{i}.{x}.kernel", f"{_LLM}.mlp.{{x}}_proj.weight", ("gate", "up", "down"), LINEAR),
    ("llm.norm.scale", "model.norm.weight", (), SAME),
    ("llm.lm_head.kernel", "lm_head.weight", (), LINEAR),
)  # fmt: skip

_UNUSED = re.compile(
    r"(^|\.)(text_mlp|post_layernorm|multimodal_resampler|vision_resampler|mm_resampler)\."
    r"|rotary_emb\.inv_freq$|embeddings\.position_ids$"
)


def is_unused(torch_name: str, config: VideoXL2Config) -> bool:
    """Whether upstream stores this tensor but never uses it in the forward pass."""
    return bool(_UNUSED.search(torch_name)) or (config.llm.tied_embeddings and torch_name == "lm_head.weight")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of one layer. `name` contains the layer number; `param` is the name of the stacked parameter."""

    name: str
    param: str
    layer: int | None
    shape: Shape
    dtype: np.dtype | None
    """That of a part of a quantised matrix. None: the dtype of the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Entry(Tensor):
    """One tensor of one layer, and its counterpart in upstream's model."""

    torch_name: str
    torch_shape: Shape
    transform: Transform


def _patterns() -> list[tuple[re.Pattern[str], str, Transform]]:
    """The table with all values of {x} filled in: (pattern of the dotted name, upstream's name, transform)."""
    rows = []
    for ours, theirs, choices, transform in _TABLE:
        for choice in choices or ("",):
            pattern = re.escape(ours.replace("{x}", choice))
            pattern = pattern.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{s\}", r"(?P<s>\d+)")
            rows.append((re.compile(pattern), theirs.replace("{x}", choice), transform))
    return rows


@functools.cache
def tensors(config: VideoXL2Config) -> tuple[Tensor, ...]:
    """Every tensor of a model with this config, layer by layer."""
    out = []
    for param, leaf in flatten(nnx.state(abstract_model(config, jnp.float32))).items():
        dtype = np.dtype(leaf.dtype) if is_quantized(param) else None
        if ".layers." not in param:
            out.append(Tensor(param, param, None, leaf.shape, dtype))
            continue
        for layer in range(leaf.shape[0]):
            name = param.replace(".layers.", f".layers.{layer}.")
            out.append(Tensor(name, param, layer, leaf.shape[1:], dtype))
    return tuple(out)


@functools.cache
def entries(config: VideoXL2Config) -> tuple[Entry, ...]:
    """Every tensor of an unquantised checkpoint with these sizes, layer by layer."""
    patterns = _patterns()
    out = []
    for tensor in tensors(config.with_weights(None)):
        matches = [(m, theirs, tr) for p, theirs, tr in patterns if (m := p.fullmatch(tensor.name))]
        if len(matches) != 1:
            raise AssertionError(f"{len(matches)} rows of the name table match {tensor.name}")
        match, theirs, transform = matches[0]
        numbers = {k: int(v) for k, v in match.groupdict().items()}
        stage = 3 * numbers.get("s", 0)
        torch_name = theirs.format(i=numbers.get("i"), s0=stage, s1=stage + 1, s2=stage + 2)
        # A zero-stride array has the tensor's shape but takes no memory.
        torch_shape = transform.to_torch(np.broadcast_to(np.int8(0), tensor.shape), config).shape
        out.append(Entry(**vars(tensor), torch_name=torch_name, torch_shape=torch_shape, transform=transform))
    return tuple(out)
