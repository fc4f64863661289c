from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_json, outcome

from xl2jax.checkpoint.param_names import entries
from xl2jax.config import PRESETS, SIGLIP_SO400M, LLMConfig, VideoXL2Config, VisionConfig
from xl2jax.errors import UserError
from xl2jax.system import schema


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


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_bound_counts_nearly_all_parameters(name: str) -> None:
    whole = sum(math.prod(e.shape) for e in entries(PRESETS[name]))
    assert 0.9 * whole < PRESETS[name]._matrices() <= whole


@pytest.mark.parametrize(
    "name",
    [
        "google/siglip-so400m-patch14-384",
        "/share/models/siglip-so400m-patch14-384",
        "../siglip-so400m-patch14-384",
    ],
)
def test_released_tower_by_name(name: str, tmp_path: Path) -> None:
    raw = PRESETS["video-xl-2"].to_hf()[0] | {"mm_vision_tower": name}
    del raw["mm_interpolate_grid"], raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = VideoXL2Config.from_hf(tmp_path)
    assert config == PRESETS["video-xl-2"]
    assert config.vision == SIGLIP_SO400M


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    """Sizes agree with the config classes of transformers, whose current version nests the RoPE settings."""
    from transformers import Qwen2Config, SiglipVisionConfig

    llm = Qwen2Config(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        layer_norm_eps=1e-5,
    )
    (tmp_path / "tower").mkdir()
    fields = {"mm_vision_tower": "tower", "mm_interpolate_grid": 4}
    (tmp_path / "config.json").write_text(json.dumps(llm.to_dict() | fields))
    (tmp_path / "tower" / "config.json").write_text(vision.to_json_string(use_diff=False))
    config = VideoXL2Config.from_hf(tmp_path)
    assert config.vision == VisionConfig(32, 48, layers=3, heads=2, image_size=70, patch_size=14, eps=1e-5)
    assert config.llm == LLMConfig(
        1000, 64, 96, layers=3, heads=4, kv_heads=2, head_width=16, rope_theta=5e5, eps=1e-5, tied_embeddings=True
    )


@pytest.mark.parametrize("name", list(PRESETS))
def test_transformers_reads_what_this_project_writes(name: str) -> None:
    from transformers import Qwen2Config, SiglipVisionConfig

    llm, vision = PRESETS[name].to_hf()
    text, tower = Qwen2Config.from_dict(llm), SiglipVisionConfig.from_dict(vision)
    sizes = PRESETS[name].llm
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers) == (sizes.vocab, sizes.width, sizes.layers)
    assert (text.num_key_value_heads, text.rope_parameters["rope_theta"]) == (sizes.kv_heads, sizes.rope_theta)
    assert (tower.hidden_size, tower.image_size) == (PRESETS[name].vision.width, PRESETS[name].vision.image_size)


REMOVED = object()
"""Marks a field that `changed` removes."""


def changed(folder: Path, change: dict[str, Any], name: str = "config.json") -> None:
    raw = json.loads((folder / name).read_text()) | change
    (folder / name).write_text(json.dumps({k: v for k, v in raw.items() if v is not REMOVED}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": REMOVED, "model_type": "llama"}, "not a Video-XL-2 checkpoint .model_type 'llama'"),
        ({"mm_vision_tower": None}, "not a Video-XL-2 checkpoint"),
        ({"mm_vision_tower": "openai/clip"}, "neither SigLIP-SO400M"),
        ({"mm_vision_tower": 7}, "mm_vision_tower: should be a valid string, not 7"),
        ({"mm_vision_tower": "x" * 5000}, "neither SigLIP-SO400M"),
        ({"mm_vision_tower": "x\x00"}, "neither SigLIP-SO400M"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_size": "64"}, "hidden_size: should be a valid integer, not '64'"),
        ({"hidden_size": REMOVED}, "hidden_size: is missing"),
        ({"hidden_size": 2**60}, "hidden_size: should be less than or equal to 1048576"),
        ({"hidden_size": 10**4000}, "hidden_size: .*not a very large number"),
        ({"hidden_size": True}, "hidden_size: should be a valid integer"),
        ({"hidden_size": 0}, "hidden_size: should be greater than or equal to 1"),
        ({"hidden_size": 63, "head_dim": None}, "63 does not divide into 4 heads"),
        ({"num_hidden_layers": 200_000}, "num_hidden_layers: should be less than or equal to 1024"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers: should be less than or equal to 1024"),
        ({"num_hidden_layers": 1024, "intermediate_size": 2**20, "hidden_size": 2**20}, "parameters are more than"),
        ({"num_key_value_heads": 3}, "not a multiple of 3 KV heads"),
        ({"head_dim": "16"}, "head_dim: should be a valid integer"),
        ({"head_dim": 15}, "head width 15 is odd"),
        ({"rms_norm_eps": float("nan")}, "not JSON"),
        ({"rms_norm_eps": float("inf")}, "not JSON"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: should be greater than 0"),
        ({"rope_theta": None}, "rope_theta: should be a valid number"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.type: should be a valid string"),
        ({"rope_scaling": "yarn"}, "rope_scaling: should be an object, not 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters: should be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta: should be a valid number"),
        ({"use_sliding_window": True}, "use_sliding_window: should be False or None, not True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: should be a valid boolean"),
        ({"mm_projector_type": "linear"}, "mm_projector_type: should be 'mlp2x_gelu', not 'linear'"),
        ({"mm_hidden_size": 48}, "mm_hidden_size 48 is not the vision width"),
        ({"mm_spatial_pool_stride": 9}, "pool stride 9 does not fit grid 4"),
        ({"mm_spatial_pool_stride": None}, "mm_spatial_pool_stride: should be a valid integer"),
        ({"mm_interpolate_grid": [24]}, "mm_interpolate_grid: should be a valid integer"),
        ({"mm_interpolate_grid": 2**31}, "mm_interpolate_grid: should be less than"),
    ],
)
def test_unsupported_configs(change: dict[str, Any], message: str, copied: Path) -> None:
    changed(copied, change)
    with pytest.raises(UserError, match=message) as e:
        VideoXL2Config.from_hf(copied)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None, "rope_parameters": None, "head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "rope_theta": REMOVED},
        {"quantization_config": None, "use_sliding_window": None, "hidden_act": REMOVED},
    ],
)
def test_variants_of_the_same_config(change: dict[str, Any], copied: Path) -> None:
    before = VideoXL2Config.from_hf(copied)
    changed(copied, change)
    assert VideoXL2Config.from_hf(copied) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "vision_tower/config.json: hidden_size: should be a valid integer"),
        ({"vision_config": "x"}, "should be an object"),
        ({"vision_config": {}}, "hidden_size: is missing"),
        ({"num_channels": 4}, "num_channels: should be 3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"image_size": 10**9}, "image_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": 700}, "patches of 700 do not fit an image of 70"),
        ({"num_hidden_layers": 1}, "2 layers or more"),
        ({"hidden_size": 48}, "not a multiple of 32"),
        ({"num_attention_heads": 5}, "not a multiple of its 5 heads"),
    ],
)
def test_unsupported_vision_configs(change: dict[str, Any], message: str, copied: Path) -> None:
    changed(copied, change, "vision_tower/config.json")
    with pytest.raises(UserError, match=message):
        VideoXL2Config.from_hf(copied)


@pytest.mark.parametrize("name", ["../tower", "vision_tower/../../tower", "{outside}"])
def test_a_tower_outside_the_folder_is_not_read(name: str, copied: Path, tmp_path: Path) -> None:
    (copied / "vision_tower").rename(tmp_path / "tower")
    changed(copied, {"mm_vision_tower": name.format(outside=tmp_path / "tower")})
    with pytest.raises(UserError, match="nor a folder with config.json below this one"):
        VideoXL2Config.from_hf(copied)


def test_links_out_of_the_folder_are_followed(copied: Path, tmp_path: Path) -> None:
    """All files of the hub's cache are such links."""
    before = VideoXL2Config.from_hf(copied)
    for name in ("config.json", "vision_tower"):
        (copied / name).rename(tmp_path / name)
        (copied / name).symlink_to(f"../{name}")
    assert VideoXL2Config.from_hf(copied) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "should be an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "vision_tower/config.json"])
def test_broken_json(text: bytes, message: str, name: str, copied: Path) -> None:
    (copied / name).write_bytes(text)
    with pytest.raises(UserError, match=message) as e:
        VideoXL2Config.from_hf(copied)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("name", ["config.json", "vision_tower/config.json"])
def test_files_that_cannot_be_read(name: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe or a device"):
        VideoXL2Config.from_hf(copied)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder, not a regular file"):
        VideoXL2Config.from_hf(copied)
    path.rmdir()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a pipe or a device"):
        VideoXL2Config.from_hf(copied)
    real = os.stat

    def stat(what: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(what) == str(path):
            raise PermissionError(13, "Permission denied")
        return real(what, *args, **kwargs)

    monkeypatch.setattr(schema.os, "stat", stat)
    with pytest.raises(UserError, match="no permission to read it"):
        VideoXL2Config.from_hf(copied)


def test_fuzzed_configs(copied: Path) -> None:
    """A damaged config is refused with one line, or it is read with the sizes in its text."""
    for name in ("config.json", "vision_tower/config.json"):
        whole = (copied / name).read_bytes()
        for seed in range(300):
            (copied / name).write_bytes(damaged_json(whole, random.Random(seed)))
            config, _ = outcome(lambda: VideoXL2Config.from_hf(copied))
            if config is None:
                continue
            llm, vision = config.to_hf()
            raw = json.loads((copied / name).read_text())
            for key, value in (llm if name == "config.json" else raw.get("vision_config") or vision).items():
                if raw.get(key) is not None and key.startswith(
                    ("hidden_size", "num_", "intermediate", "mm_i", "mm_sp")
                ):
                    assert raw[key] == value
        (copied / name).write_bytes(whole)
