from __future__ import annotations

import json
from pathlib import Path

import pytest

from xl2jax.config import PRESETS, SIGLIP_SO400M, VideoXL2Config
from xl2jax.errors import UserError


def test_reads_upstreams_config(goldens: Path) -> None:
    config = VideoXL2Config.from_hf(goldens / "geometry" / "checkpoint")
    assert config.vision.patch_grid == 27
    assert config.vision.run_layers == 3
    assert (config.grid, config.visual_tokens) == (24, 144)
    assert (config.llm.head_width, config.llm.kv_heads, config.llm.rope_theta) == (16, 2, 1e6)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_config_json(name: str, tmp_path: Path) -> None:
    llm, vision = PRESETS[name].to_hf()
    (tmp_path / "vision_tower").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(llm))
    (tmp_path / "vision_tower" / "config.json").write_text(json.dumps(vision))
    assert VideoXL2Config.from_hf(tmp_path) == PRESETS[name]


@pytest.mark.parametrize("name", ["google/siglip-so400m-patch14-384", "/share/models/siglip-so400m-patch14-384"])
def test_released_tower_by_name(name: str, tmp_path: Path) -> None:
    raw = PRESETS["video-xl-2"].to_hf()[0] | {"mm_vision_tower": name}
    del raw["mm_interpolate_grid"], raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = VideoXL2Config.from_hf(tmp_path)
    assert config == PRESETS["video-xl-2"]
    assert config.vision == SIGLIP_SO400M


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": None}, "not a Video-XL-2 checkpoint"),
        ({"mm_vision_tower": "openai/clip"}, "neither SigLIP-SO400M"),
        ({"hidden_size": "64"}, "hidden_size is missing or not a whole number"),
        ({"num_key_value_heads": 3}, "not a multiple of 3 KV heads"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_hidden_size": 48}, "not the vision width"),
        ({"mm_spatial_pool_stride": 9}, "pool stride"),
    ],
)
def test_configs_that_cannot_be_served(change: dict, message: str, checkpoint: Path, copied: Path) -> None:
    raw = json.loads((copied / "config.json").read_text()) | change
    if raw["mm_vision_tower"] is None:
        del raw["mm_vision_tower"]
    (copied / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        VideoXL2Config.from_hf(copied)


def test_broken_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        VideoXL2Config.from_hf(copied)
