"""Sizes of the networks: frozen dataclasses, upstream's config.json in both directions, presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xl2jax.errors import UserError

FRAMES_PER_GROUP = 4
"""Frames that DTS merges into one group (spec of the released model: two temporal strides of 2)."""

VISION_FOLDER = "vision_tower"
"""Folder beside config.json that holds the vision tower's own config.json."""

_SO400M_NAME = "siglip-so400m-patch14-384"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP vision tower. `layers` counts the stored layers; the last one is never run."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    eps: float = 1e-6

    @property
    def run_layers(self) -> int:
        return self.layers - 1

    @property
    def patch_grid(self) -> int:
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Qwen2.5 decoder."""

    vocab: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    rope_theta: float = 1e6
    eps: float = 1e-6
    tied_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class VideoXL2Config:
    """The whole model. `grid` is the side of the feature map after resampling (24 as released)."""

    vision: VisionConfig
    llm: LLMConfig
    grid: int = 24
    pool_stride: int = 2

    @property
    def visual_tokens(self) -> int:
        """V, visual tokens of one group."""
        return (self.grid // self.pool_stride) ** 2

    @classmethod
    def from_hf(cls, folder: str | Path) -> VideoXL2Config:
        """Reads upstream's `config.json` (a Qwen2 config with `mm_*` fields).

        The vision sizes come from the folder that `mm_vision_tower` names beside config.json, or,
        where that is SigLIP-SO400M's hub name, from the released figures.

        Raises:
          UserError: no config.json, not JSON, a field is missing or asks for what the model lacks.
        """
        folder = Path(folder)
        raw = _read_json(folder / "config.json")
        where = str(folder / "config.json")
        if "mm_vision_tower" not in raw:
            kind = raw.get("model_type", "unknown")
            raise UserError(f"{where}: not a Video-XL-2 checkpoint (model_type {kind!r}, no mm_vision_tower)")
        llm = _llm_config(raw, where)
        vision = _vision_config(folder, str(raw["mm_vision_tower"]))
        for key, wanted in (
            ("mm_projector_type", "mlp2x_gelu"),
            ("mm_spatial_pool_mode", "average"),
            ("mm_vision_select_feature", "patch"),
        ):
            if raw.get(key, wanted) != wanted:
                raise UserError(f"{where}: {key} = {raw[key]!r} is not supported (only {wanted!r})")
        if raw.get("mm_hidden_size", vision.width) != vision.width:
            raise UserError(f"{where}: mm_hidden_size {raw['mm_hidden_size']} is not the vision width {vision.width}")
        config = cls(
            vision=vision,
            llm=llm,
            grid=int(raw.get("mm_interpolate_grid", 24)),
            pool_stride=int(raw.get("mm_spatial_pool_stride", 2)),
        )
        config.check(where)
        return config

    def check(self, where: str = "config") -> None:
        """Raises UserError where sizes contradict each other."""
        v, t = self.vision, self.llm
        problems = []
        for part in (v, t):
            for field in dataclasses.fields(part):
                if field.name != "tied_embeddings" and getattr(part, field.name) <= 0:
                    problems.append(f"{field.name} must be positive")
        if not problems:
            if v.width % v.heads:
                problems.append(f"vision width {v.width} is not a multiple of its {v.heads} heads")
            if v.width % 32:
                problems.append(f"vision width {v.width} is not a multiple of 32 (DTS norm groups)")
            if v.layers < 2:
                problems.append("the vision tower needs 2 layers or more (the last is dropped)")
            if t.heads % t.kv_heads:
                problems.append(f"{t.heads} heads are not a multiple of {t.kv_heads} KV heads")
            if t.head_width % 2:
                problems.append(f"head width {t.head_width} is odd")
            if not 1 <= self.pool_stride <= self.grid:
                problems.append(f"pool stride {self.pool_stride} does not fit grid {self.grid}")
        if problems:
            raise UserError(f"{where}: " + "; ".join(problems))

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(config.json, vision_tower/config.json) in upstream's fields: `from_hf` reads them back."""
        v, t = self.vision, self.llm
        return {
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava_qwen",
            "vocab_size": t.vocab,
            "hidden_size": t.width,
            "intermediate_size": t.mlp_width,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads,
            "head_dim": t.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": t.eps,
            "rope_theta": t.rope_theta,
            "tie_word_embeddings": t.tied_embeddings,
            "use_sliding_window": False,
            "mm_vision_tower": VISION_FOLDER,
            "mm_hidden_size": v.width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "unires",
            "mm_resampler_type": None,
            "mm_spatial_pool_stride": self.pool_stride,
            "mm_spatial_pool_mode": "average",
            "mm_vision_select_feature": "patch",
            "mm_interpolate_grid": self.grid,
            "image_aspect_ratio": "anyres",
        }, {
            "model_type": "siglip_vision_model",
            "hidden_size": v.width,
            "intermediate_size": v.mlp_width,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": v.eps,
            "attention_dropout": 0.0,
        }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file (a checkpoint folder holds config.json)")
    try:
        raw = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object")
    return raw


def _need(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: {key} is missing or not a whole number")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {key} is not a number")
    return float(value)


def _llm_config(raw: Mapping[str, Any], where: str) -> LLMConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{where}: RoPE scaling {rope!r} is not supported")
    if raw.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported (only 'silu')")
    width, heads = _need(raw, "hidden_size", where), _need(raw, "num_attention_heads", where)
    if heads <= 0 or (raw.get("head_dim") is None and width % heads):
        raise UserError(f"{where}: hidden_size {width} does not divide into {heads} heads")
    theta = rope["rope_theta"] if "rope_theta" in rope else _number(raw, "rope_theta", 1e6, where)
    return LLMConfig(
        vocab=_need(raw, "vocab_size", where),
        width=width,
        mlp_width=_need(raw, "intermediate_size", where),
        layers=_need(raw, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_need(raw, "num_key_value_heads", where),
        head_width=int(raw["head_dim"]) if raw.get("head_dim") is not None else width // heads,
        rope_theta=float(theta),
        eps=_number(raw, "rms_norm_eps", 1e-6, where),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _vision_config(folder: Path, name: str) -> VisionConfig:
    path = folder / name / "config.json"
    if not path.is_file():
        # An absolute path of the machine that trained the model ends in the tower's public name.
        if Path(name).name == _SO400M_NAME:
            return SIGLIP_SO400M
        raise UserError(
            f"{folder / 'config.json'}: mm_vision_tower {name!r} is neither SigLIP-SO400M "
            f"({_SO400M_NAME}) nor a folder with config.json beside it"
        )
    raw = _read_json(path)
    raw = raw.get("vision_config", raw)
    where = str(path)
    if raw.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported (only 'gelu_pytorch_tanh')")
    if raw.get("num_channels", 3) != 3:
        raise UserError(f"{where}: num_channels must be 3")
    return VisionConfig(
        width=_need(raw, "hidden_size", where),
        mlp_width=_need(raw, "intermediate_size", where),
        layers=_need(raw, "num_hidden_layers", where),
        heads=_need(raw, "num_attention_heads", where),
        image_size=_need(raw, "image_size", where),
        patch_size=_need(raw, "patch_size", where),
        eps=_number(raw, "layer_norm_eps", 1e-6, where),
    )


SIGLIP_SO400M = VisionConfig(width=1152, mlp_width=4304, layers=27, heads=16, image_size=384, patch_size=14)

PRESETS: Mapping[str, VideoXL2Config] = {
    "video-xl-2": VideoXL2Config(
        vision=SIGLIP_SO400M,
        llm=LLMConfig(vocab=152064, width=3584, mlp_width=18944, layers=28, heads=28, kv_heads=4, head_width=128),
    ),
    # Released image geometry (144 visual tokens a group), small networks: runs anywhere.
    "small": VideoXL2Config(
        vision=VisionConfig(width=64, mlp_width=128, layers=3, heads=4, image_size=384, patch_size=14),
        llm=LLMConfig(vocab=512, width=128, mlp_width=352, layers=4, heads=4, kv_heads=2, head_width=32),
    ),
    # The bundled checkpoint: trained on `xl2jax.synthetic`, 16 visual tokens a group.
    "demo": VideoXL2Config(
        vision=VisionConfig(width=96, mlp_width=288, layers=4, heads=4, image_size=56, patch_size=7),
        llm=LLMConfig(vocab=512, width=256, mlp_width=640, layers=6, heads=4, kv_heads=2, head_width=64),
        grid=8,
    ),
    # Everything small: tests.
    "tiny": VideoXL2Config(
        vision=VisionConfig(width=32, mlp_width=48, layers=3, heads=2, image_size=70, patch_size=14),
        llm=LLMConfig(vocab=512, width=64, mlp_width=96, layers=3, heads=4, kv_heads=2, head_width=16),
        grid=4,
    ),
    # The LLM of `xl2jax.bench prefill` and `decode`.
    "bench": VideoXL2Config(
        vision=VisionConfig(width=64, mlp_width=128, layers=2, heads=4, image_size=384, patch_size=14),
        llm=LLMConfig(vocab=1000, width=512, mlp_width=1408, layers=6, heads=8, kv_heads=2, head_width=64),
    ),
}
