"""Sizes of the networks: frozen dataclasses, reading and writing of upstream's config.json, and presets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field

from xl2jax.errors import UserError
from xl2jax.system.schema import Schema, check, is_file, path_problem, quoted, read_json

type Weights = Literal["int8", "int4"]
"""Matrices in 8 or in 4 bits (`xl2jax.ops.weights`)."""

FRAMES_PER_GROUP = 4
"""Frames that DTS merges into one group: it has two temporal strides of 2."""

TILE_POOL = 2
"""Side of the squares over which the tokens of a picture's tile are averaged. Upstream has it fixed."""

GRIDS = tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7))
"""The grids of tiles that the released model knows, in the order in which they are tried."""

VISION_FOLDER = "vision_tower"
"""Name of the folder beside config.json that holds the vision tower's config.json."""

_SO400M_NAME = "siglip-so400m-patch14-384"


def foreign_weights(method: str) -> str:
    """The message that weights which others quantised are not read, and what to do."""
    return (
        f"the weights are quantised in a format that is not read ({method}): give the model as its authors released it, "
        "and --weights int8 or int4 to quantise it on loading"
    )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP vision tower. `layers` counts the stored layers; the last one is not used."""

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
    weights: Weights | None = dataclasses.field(default=None, repr=False)
    """How the matrices are stored: in 8 or 4 bits, or in the dtype of the other parameters. It is no part of
    config.json. `repr` leaves it out: caches and runs are told apart by the parameters themselves."""


@dataclasses.dataclass(frozen=True)
class VideoXL2Config:
    """The whole model. `grid` is the side of the feature map after resampling (24 in the released model)."""

    vision: VisionConfig
    llm: LLMConfig
    grid: int = 24
    pool_stride: int = 2
    picture_grids: tuple[tuple[int, int], ...] | None = dataclasses.field(default=GRIDS, repr=False)
    """(columns, rows) of the grids of tiles that a picture may have, in the order in which they are tried. None: the
    checkpoint wants pictures in a form that is not implemented. `repr` leaves it out: caches and runs of videos do not
    depend on it."""

    @property
    def visual_tokens(self) -> int:
        """V, visual tokens of one group."""
        return (self.grid // self.pool_stride) ** 2

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of one tile of a picture."""
        return (self.grid // TILE_POOL) ** 2

    def grids(self) -> tuple[tuple[int, int], ...]:
        """`picture_grids`. Raises UserError where the checkpoint wants pictures in another form."""
        if self.picture_grids is None:
            raise UserError(
                "this checkpoint's config.json asks for pictures in a form that is not implemented (only "
                "image_aspect_ratio anyres with mm_patch_merge_type unires is)"
            )
        return self.picture_grids

    def can_have(self, weights: Weights | None) -> bool:
        """Whether the sizes of the LLM's matrices allow it. In 4 bits, 32 to 128 inputs share a scale."""
        t = self.llm
        return weights != "int4" or not any(n % 32 for n in (t.width, t.heads * t.head_width, t.mlp_width))

    def with_weights(self, weights: Weights | None) -> VideoXL2Config:
        """The same sizes with the LLM's matrices in 8 or 4 bits, or in the dtype of the other parameters.

        Raises:
          UserError: 4 bits are asked for where a matrix has a number of inputs that is not a multiple of 32.
        """
        if not self.can_have(weights):
            raise UserError(
                "weights int4: a matrix of this model has a number of inputs that is not a multiple of 32, as groups that "
                "share a scale need (int8 has no such limit)"
            )
        return dataclasses.replace(self, llm=dataclasses.replace(self.llm, weights=weights))

    @classmethod
    def from_hf(cls, folder: str | Path) -> VideoXL2Config:
        """Reads upstream's `config.json` (a Qwen2 config with `mm_*` fields).

        The vision sizes come from the config.json in the folder that `mm_vision_tower` names. If it names
        SigLIP-SO400M on the hub instead, the sizes are those of that model.

        Raises:
          UserError: config.json is missing or not JSON; a field is missing, has a wrong type, is out of bounds or asks
            for something that is not implemented; or sizes contradict each other.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not is_file(path):
            raise UserError(f"{path}: no such file (a checkpoint folder holds config.json)")
        raw = read_json(path, dict[str, Any])
        if raw.get("mm_vision_tower") is None:
            kind = quoted(raw.get("model_type", "unknown"))
            raise UserError(f"{path}: not a Video-XL-2 checkpoint (model_type {kind}, no mm_vision_tower)")
        if (foreign := raw.get("quantization_config")) is not None:
            method = foreign.get("quant_method", "unknown") if isinstance(foreign, dict) else foreign
            raise UserError(f"{path}: {foreign_weights(quoted(method))}")
        fields = check(raw, _ModelFields, path)
        config = cls(
            vision=_vision_config(folder, fields.mm_vision_tower),
            llm=_llm_config(fields, path),
            grid=fields.mm_interpolate_grid,
            pool_stride=fields.mm_spatial_pool_stride,
        )
        problems = config._contradictions()
        if fields.mm_hidden_size not in (None, config.vision.width):
            problems.append(f"mm_hidden_size {fields.mm_hidden_size} is not the vision width {config.vision.width}")
        if problems:
            raise UserError(f"{path}: " + "; ".join(problems))
        return dataclasses.replace(config, picture_grids=_picture_grids(fields, config.vision.image_size, path))

    def _contradictions(self) -> list[str]:
        """The contradictions between sizes that are each within their bounds."""
        v, t = self.vision, self.llm
        problems = {
            f"vision width {v.width} is not a multiple of its {v.heads} heads": v.width % v.heads,
            f"vision width {v.width} is not a multiple of 32 (DTS norm groups)": v.width % 32,
            "the vision tower needs 2 layers or more (the last is dropped)": v.layers < 2,
            f"patches of {v.patch_size} do not fit an image of {v.image_size}": v.patch_size > v.image_size,
            f"{t.heads} heads are not a multiple of {t.kv_heads} KV heads": t.heads % t.kv_heads,
            f"head width {t.head_width} is odd": t.head_width % 2,
            f"pool stride {self.pool_stride} does not fit grid {self.grid}": self.pool_stride > self.grid,
            f"{self._matrices():.1e} parameters are more than the limit of {_MAX_PARAMETERS:.1e}": (
                self._matrices() > _MAX_PARAMETERS
            ),
        }
        return [text for text, wrong in problems.items() if wrong]

    def _matrices(self) -> int:
        """Number of elements of all matrices and kernels, which is nearly all parameters."""
        v, t = self.vision, self.llm
        embeddings = (1 if t.tied_embeddings else 2) * t.vocab * t.width + v.patch_grid**2 * v.width
        vision = v.run_layers * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 3 * v.patch_size**2 * v.width
        dts, projector = 2 * (8 + 27) * v.width**2, v.width * t.width + t.width**2
        attention = 2 * (t.heads + t.kv_heads) * t.head_width * t.width
        return embeddings + vision + dts + projector + t.layers * (attention + 3 * t.width * t.mlp_width)

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of config.json and of vision_tower/config.json in upstream's format, which `from_hf` reads."""
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
            "image_aspect_ratio": "square" if self.picture_grids is None else "anyres",
            "image_grid_pinpoints": [[v.image_size * side for side in grid] for grid in self.picture_grids or GRIDS],
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


_MAX_PARAMETERS = 2**40
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Layers = Annotated[int, Field(ge=1, le=1024)]
_Side = Annotated[int, Field(ge=1, le=2**14)]
_Positive = Annotated[float, Field(gt=0)]


class _Rope(Schema):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None


class _ModelFields(Schema):
    """config.json."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: _Size | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: _Positive = 1e-6
    rope_theta: _Positive = 1e6
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool = False
    use_sliding_window: Literal[False, None] = False
    mm_vision_tower: str
    mm_hidden_size: _Size | None = None
    mm_projector_type: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    mm_spatial_pool_mode: Literal["average"] = "average"
    mm_vision_select_feature: Literal["patch"] = "patch"
    mm_interpolate_grid: _Side = 24
    mm_spatial_pool_stride: _Side = 2
    image_aspect_ratio: str | None = None
    mm_patch_merge_type: str | None = None
    image_grid_pinpoints: str | list[Annotated[list[_Side], Field(min_length=2, max_length=2)]] | None = None


class _VisionFields(Schema):
    """The vision tower's config.json, or the `vision_config` in it."""

    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    image_size: _Side
    patch_size: _Side
    layer_norm_eps: _Positive = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    num_channels: Literal[3] = 3


def _llm_config(fields: _ModelFields, where: Path) -> LLMConfig:
    rope = fields.rope_parameters or fields.rope_scaling or _Rope()
    kind = rope.rope_type or rope.type or "default"
    if kind != "default":
        raise UserError(f"{where}: RoPE scaling {quoted(kind)} is not supported")
    width, heads = fields.hidden_size, fields.num_attention_heads
    if fields.head_dim is None and width % heads:
        raise UserError(f"{where}: hidden_size {width} does not divide into {heads} heads")
    return LLMConfig(
        vocab=fields.vocab_size,
        width=width,
        mlp_width=fields.intermediate_size,
        layers=fields.num_hidden_layers,
        heads=heads,
        kv_heads=fields.num_key_value_heads,
        head_width=fields.head_dim or width // heads,
        rope_theta=rope.rope_theta or fields.rope_theta,
        eps=fields.rms_norm_eps,
        tied_embeddings=fields.tie_word_embeddings,
    )


_MAX_TILES = 1024  # of a picture


def _picture_grids(fields: _ModelFields, tile: int, where: Path) -> tuple[tuple[int, int], ...] | None:
    """The grids of `image_grid_pinpoints`, as upstream reads them; those of the released model where it is missing.

    A list has (width, height) in pixels. A text with an x names ranges of columns and rows: "(1x1),...,(6x6)".
    """
    if fields.image_aspect_ratio not in (None, "anyres") or fields.mm_patch_merge_type not in (None, "unires"):
        return None
    points = fields.image_grid_pinpoints
    if points is None:
        return GRIDS
    wrong = UserError(f"{where}: image_grid_pinpoints: {quoted(str(points))} names no grids of tiles of {tile} pixels")
    if isinstance(points, str):
        if "x" in points:
            pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,4})x(\d{1,4})\)", points)]
            if not pairs:
                raise wrong
            (first_column, first_row), (last_column, last_row) = pairs[0], pairs[-1]
            if last_column * last_row > _MAX_TILES:
                raise wrong
            columns, rows = range(first_column, last_column + 1), range(first_row, last_row + 1)
            grids = tuple((c, r) for c in columns for r in rows)
        else:
            sides = [int(n) for n in re.findall(r"\d{1,5}", points)]
            points = [list(pair) for pair in zip(sides[::2], sides[1::2], strict=False)]
    if not isinstance(points, str):
        if any(width % tile or height % tile for width, height in points):
            raise wrong
        grids = tuple((width // tile, height // tile) for width, height in points)
    if not grids or any(not 0 < c * r <= _MAX_TILES for c, r in grids):
        raise wrong
    return grids


def vision_config_path(folder: Path, name: str) -> Path | None:
    """Path of the config.json in the folder `name` (from `mm_vision_tower`), or None if it is not in `folder`."""
    path = folder / name / "config.json"
    return path if path_problem(name) is None and is_file(path) else None


def _vision_config(folder: Path, name: str) -> VisionConfig:
    path = vision_config_path(folder, name)
    if path is None:
        # On the machine that trained the model this was an absolute path that ends in the tower's public name.
        if PurePosixPath(name).name == _SO400M_NAME:
            return SIGLIP_SO400M
        raise UserError(
            f"{folder / 'config.json'}: mm_vision_tower {quoted(name)} is neither SigLIP-SO400M "
            f"({_SO400M_NAME}) nor a folder with config.json below this one"
        )
    raw = read_json(path, dict[str, Any])
    fields = check(raw.get("vision_config", raw), _VisionFields, path)
    return VisionConfig(
        width=fields.hidden_size,
        mlp_width=fields.intermediate_size,
        layers=fields.num_hidden_layers,
        heads=fields.num_attention_heads,
        image_size=fields.image_size,
        patch_size=fields.patch_size,
        eps=fields.layer_norm_eps,
    )


SIGLIP_SO400M = VisionConfig(width=1152, mlp_width=4304, layers=27, heads=16, image_size=384, patch_size=14)

PRESETS: Mapping[str, VideoXL2Config] = {
    "video-xl-2": VideoXL2Config(
        vision=SIGLIP_SO400M,
        llm=LLMConfig(vocab=152064, width=3584, mlp_width=18944, layers=28, heads=28, kv_heads=4, head_width=128),
    ),
    # Small networks with the released image geometry (144 visual tokens a group). Runs on any machine.
    "small": VideoXL2Config(
        vision=VisionConfig(width=64, mlp_width=128, layers=3, heads=4, image_size=384, patch_size=14),
        llm=LLMConfig(vocab=512, width=128, mlp_width=352, layers=4, heads=4, kv_heads=2, head_width=32),
    ),
    # The bundled checkpoint, trained on `xl2jax.recipes.demo.datasets`. It has 16 visual tokens a group.
    "demo": VideoXL2Config(
        vision=VisionConfig(width=96, mlp_width=288, layers=4, heads=4, image_size=56, patch_size=7),
        llm=LLMConfig(vocab=512, width=256, mlp_width=640, layers=6, heads=4, kv_heads=2, head_width=64),
        grid=8,
    ),
    # The smallest model, for tests.
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
