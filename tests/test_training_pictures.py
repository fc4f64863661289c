"""Training on pictures: records, ids and labels against upstream's, and runs on mixed data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_seeing import byte_tokenizer
from training_runs import metrics, turns

import xl2jax
from xl2jax.commands import train
from xl2jax.config import VideoXL2Config
from xl2jax.models.param_tree import flatten
from xl2jax.prompt import PromptTokenizer
from xl2jax.testing import write_clip
from xl2jax.training.batches import Length, padded_tiles, plan_epoch, probe_records
from xl2jax.training.loader import Loader
from xl2jax.training.loss import TokenBatch, token_loss
from xl2jax.training.records import Record, read_records
from xl2jax.training.samples import open_media, sample_tokens
from xl2jax.video.frame_sampling import FrameSampling

SAMPLING = FrameSampling(1, 4, 8)


@pytest.fixture(scope="module")
def case(goldens: Path) -> dict[str, Any]:
    """Upstream's ids and labels, by sample and by batch."""
    return json.loads((goldens / "images_tiny" / "expected" / "train.json").read_text())


@pytest.fixture(scope="module")
def records(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = goldens / "images_tiny"
    rows = [sample["json"] for sample in json.loads((folder / "train_samples.json").read_text())["samples"]]
    file = tmp_path_factory.mktemp("records") / "samples.json"
    file.write_text(json.dumps(rows))
    data = read_records(file, 0, folder / "pictures")
    assert data.malformed == []
    assert data.cut == 2  # two_lines and interleaved
    return {record.id: record for record in data.records}


def test_ids_and_labels_are_upstreams(goldens: Path, case: dict[str, Any], records: dict[str, Record]) -> None:
    model = VideoXL2Config.from_hf(goldens / "images_tiny" / "checkpoint")
    specials = json.loads((goldens / "images_tiny" / "case.json").read_text())["tokenizer"]["specials"]
    tokenizer = PromptTokenizer(byte_tokenizer(specials))
    single = [b for b in case["batches"] if len(b["samples"]) == 1]
    assert len(single) == 9
    for batch in single:
        (name,) = batch["samples"]
        media = open_media(records[name], SAMPLING, model)
        limit = batch.get("model_max_length", 999)
        if limit == 80:  # it holds no part of an answer, and is refused
            continue
        got = sample_tokens(records[name], media, tokenizer, model, limit)
        assert got.labels.tolist() == batch["merged_labels"][0], name
        assert got.cut == ("model_max_length" in batch)
        sample = case["samples"][name]
        if not got.cut:
            text = [i for i in sample["input_ids"] if i != -200]
            assert got.ids[got.visual < 0].tolist() == text, name
        visual = got.visual[got.visual >= 0]
        assert visual.tolist() == list(range(len(visual)))
        assert [t + 1 for t in media.tiles] == [v[0] for v in sample["views"]] or not records[name].pictures


@pytest.mark.slow
def test_a_text_has_no_visual_gradient_and_needs_no_dummy(model: xl2jax.Model) -> None:
    """A batch without frames and tiles, and one with tiles that no token reads: loss and gradients are the same."""
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    tokens = TokenBatch(ids, jnp.full_like(ids, -1), ids)
    network = model.network

    @jax.jit
    def gradients(tiles: jax.Array) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            whole = nnx.merge(nnx.graphdef(network.model), params)
            return token_loss(whole, jnp.zeros((1, 0, 70, 70, 3)), tokens, tiles)[0]

        return jax.value_and_grad(loss)(network.params)

    (loss, bare), (same, dummy) = (gradients(jnp.zeros((1, n, 70, 70, 3))) for n in (0, 1))
    assert loss == same
    for name, value in flatten(bare).items():
        assert np.array_equal(value, flatten(dummy)[name])
        assert name.startswith("llm.") or not np.asarray(value).any()


def test_tiles_have_few_shapes() -> None:
    assert [padded_tiles(n) for n in (0, 1, 3, 4, 5, 9, 20, 36)] == [0, 1, 3, 4, 6, 10, 20, 40]
    lengths = [Length(0, 50 * n, n) for n in (1, 9, 36)]
    [[row]] = plan_epoch(lengths, 1, 1, 0, 0, pack_to=9999)
    assert (row.groups, row.tiles) == (0, 48)
    assert repr(lengths[0]) == "Length(groups=0, tokens=50)"  # the identity of earlier runs


def test_a_picture_that_changed_is_reported(tmp_path: Path, model: xl2jax.Model) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (70, 70)).save(picture)
    record = Record("a", "image", None, (("user", "What?"), ("assistant", "Black.")), 1.0, (picture,), (1, 0))
    probe = probe_records([record], SAMPLING, model.tokenizer, model.config, 999, threads=1)
    lengths = [x for x in probe.lengths if x is not None]
    [[plan]] = plan_epoch(lengths, 1, 1, 0, 0)
    loader = Loader([record], SAMPLING, model.tokenizer, model.config, 999)
    assert loader(plan)["failed"] == []
    Image.new("RGB", (210, 70)).save(picture)
    assert "longer than when training began" in loader(plan)["failed"][0]
    picture.write_bytes(b"no picture")
    assert "not an image" in loader(plan)["failed"][0]


COLOURS = {"Red.": (220, 30, 30), "Blue.": (30, 60, 230)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, single and several pictures of different sizes, and a video."""
    folder = tmp_path_factory.mktemp("mixed")
    rows: list[dict[str, Any]] = []
    for number, (answer, colour) in enumerate(COLOURS.items()):
        for size in ((70, 70), (140, 70)):
            name = f"{number}-{size[0]}.png"
            Image.new("RGB", size, colour).save(folder / name)
            rows.append({"id": name, "image": name, "conversations": turns("<image>\nWhich?", answer)})
    both = ["0-70.png", "1-140.png"]
    rows.append({"id": "both", "image": both, "conversations": turns("<image><image>\nWhich?", "Red. Blue.")})
    rows.append({"id": "text", "conversations": turns("Ready?", "Yes.")})
    write_clip(folder / "clip.mp4", 8, fps=2, width=64, height=48)
    rows.append({"id": "clip", "video": "clip.mp4", "conversations": turns("<image>\nWhat?", "Shapes.")})
    rows.append({"id": "text too", "conversations": turns("Hello?", "Hello.")})
    (folder / "mixed.json").write_text(json.dumps(rows))
    return folder / "mixed.json"


@pytest.mark.slow
def test_a_mixed_set_trains_and_resumes_bit_for_bit(
    mixed: Path, checkpoint: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """The model learns the colours; a run that was stopped gives the same weights; the result answers from pictures."""
    flags = (
        "--checkpoint", checkpoint, "--data", mixed, "--preset", "stage3", "--max-frames", 8, "--compute-dtype", "float32",
        "--global-batch", 4, "--micro-batch", 2, "--epochs", 20, "--learning-rate", 3e-3, "--no-tensorboard",
        "--save-every", 17,
    )  # fmt: skip
    folders = tmp_path / "whole", tmp_path / "parts"
    exported = [tmp_path / "exported-whole", tmp_path / "exported-parts"]
    status, _, err = command(train.main, *flags, "--output", folders[0], "--export", exported[0])
    assert status == 0, err
    assert "one view" not in err
    losses = [row["loss"] for row in metrics(folders[0])]
    assert np.mean(losses[-4:]) < 0.05 * np.mean(losses[:4])
    # Stopped after a checkpoint, and continued.
    shutil.copytree(folders[0], folders[1])
    for step in (folders[1] / "checkpoints").iterdir():
        if step.name.isdigit() and int(step.name) > 34:
            shutil.rmtree(step)
    status, _, err = command(train.main, *flags, "--output", folders[1], "--export", exported[1])
    assert status == 0, err
    assert "resumed from step 34" in err
    whole, parts = (xl2jax.load(folder) for folder in exported)
    for name, value in flatten(whole.params).items():
        assert np.array_equal(value, flatten(parts.params)[name]), name
    for name, answer in (("0-70.png", "Red."), ("1-140.png", "Blue.")):
        with whole.see([mixed.parent / name]) as seen:
            assert whole.ask(seen, "Which?", max_new_tokens=8).text == answer
