"""One model over several devices, and copies of it. Programs run on virtual devices, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from virtual_devices import on_devices

from xl2jax.commands import infer, needle, plan, verify
from xl2jax.config import PRESETS
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.inference.copies import share
from xl2jax.inference.devices import Devices
from xl2jax.models.param_tree import flatten
from xl2jax.models.sharding import (
    check_split,
    copy_heads,
    head_copies,
    inference_sharding,
    single_heads,
    with_head_copies,
    without_head_copies,
)
from xl2jax.models.video_xl2 import abstract_model

RELEASED = PRESETS["video-xl-2"]
GIB = 2**30


# --- how parameters are split ---------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "least"), [(None, 0.99), ("int8", 0.98), ("int4", 0.98)])
def test_the_llm_is_split_evenly(weights: Any, least: float) -> None:
    """All but norms and biases: each of four devices holds a quarter, and the vision tower whole."""
    config = RELEASED.with_weights(weights)
    mesh: Any = jax.sharding.AbstractMesh((4,), ("tensor",))
    params = flatten(nnx.state(abstract_model(config, jnp.bfloat16)))
    split = {n for n, x in params.items() if any(inference_sharding(n, x.shape, mesh).spec)}
    assert all(name.startswith("llm.") for name in split)
    llm = {n: x.size * x.dtype.itemsize for n, x in params.items() if n.startswith("llm.")}
    assert sum(size for n, size in llm.items() if n in split) > least * sum(llm.values())
    whole, quarter = (memory.weight_bytes(config, "bfloat16", n) for n in (1, 4))
    rest = whole - sum(llm.values())
    assert quarter == pytest.approx(rest + sum(llm.values()) / 4, rel=0.01)
    placed = {n: inference_sharding(n, x.shape, mesh).shard_shape(x.shape) for n, x in params.items()}
    assert quarter == sum(int(np.prod(placed[n])) * x.dtype.itemsize for n, x in params.items())


def test_kv_is_split_and_heads_are_copied_where_there_are_too_few() -> None:
    sizes = [memory.slot_bytes(RELEASED, "bfloat16", tensor=n) for n in (1, 2, 4)]
    assert sizes == [57344, 28672, 14336]
    few = PRESETS["bench"]  # 8 heads, 2 KV heads
    assert [head_copies(few, n) for n in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert with_head_copies(few, 4).llm.kv_heads == 8
    assert without_head_copies(with_head_copies(few, 4), 4) == few


@pytest.mark.parametrize("name", ["kernel", "bias", "codes", "codes_scale"])
def test_copies_of_heads_stand_side_by_side(name: str) -> None:
    """Two heads of width 3, twice each: a device that has a quarter of the outputs has one whole head."""
    outputs = np.arange(6)
    layer = {"kernel": np.stack([outputs, outputs + 10]), "codes": np.stack([outputs, outputs + 10], 1)}.get(
        name, outputs
    )
    axis = -1 if name == "kernel" else 0
    copied = copy_heads(f"llm.layers.k.{name}", layer, 2, 3)
    assert np.take(copied, np.arange(12), axis).shape == copied.shape
    parts = np.split(copied, 4, axis)
    assert np.array_equal(parts[0], parts[1])
    assert np.array_equal(parts[2], parts[3])
    assert np.array_equal(np.concatenate([parts[0], parts[2]], axis), layer)
    stacked = jnp.asarray(np.stack([copied, copied + 1]))
    assert np.array_equal(single_heads(f"llm.layers.k.{name}", stacked, 2, 3), np.stack([layer, layer + 1]))
    assert copy_heads(f"llm.layers.q.{name}", layer, 2, 3) is layer


@pytest.mark.parametrize(
    ("tensor", "weights", "message"),
    [
        (3, None, "--tensor 3 does not divide 28 heads, 18944 LLM MLP width, 4 KV heads"),
        (8, None, "--tensor 8 does not divide 28 heads$"),
        (7, None, "4 KV heads .and is no multiple of them"),
        (4, "int8", None),
        (4, "int4", None),
        (2, "int4", None),
    ],
)
def test_what_cannot_be_split(tensor: int, weights: Any, message: str | None) -> None:
    config = RELEASED.with_weights(weights)
    if message is None:
        check_split(config, tensor)
        return
    with pytest.raises(UserError, match=message):
        check_split(config, tensor)


def test_groups_of_4_bits_stay_whole() -> None:
    llm = dataclasses.replace(PRESETS["demo"].llm, mlp_width=640, weights="int4")  # 5 groups of 128 inputs
    with pytest.raises(UserError, match="--tensor 2 does not divide 5 groups of inputs of the MLP in 4 bits"):
        check_split(dataclasses.replace(PRESETS["demo"], llm=llm), 2)


def test_more_devices_than_there_are() -> None:
    there = jax.device_count()
    with pytest.raises(UserError, match=f"--tensor {2 * there} needs {2 * there} devices, {there} are there"):
        Devices(2 * there).meshes()
    with pytest.raises(UserError, match="--tensor must be"):
        Devices(0)


@pytest.mark.parametrize("flags", [("--tensor", 3), ("--tensor", 0), ("--tensor", 4)])
def test_a_wrong_split_is_one_line_before_anything_is_loaded(
    flags: tuple[object, ...],
    refused: Callable[..., str],
    checkpoint: Path,
    clip: Path,
    goldens: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    for name in ("load", "load_split"):
        monkeypatch.setattr(f"xl2jax.checkpoint.params.ParamReader.{name}", load)
    expected = {3: "does not divide 4 heads", 0: "must be a whole number", 4: "needs 4 devices, 1 are there"}[flags[1]]  # type: ignore[index]
    calls: list[tuple[Any, ...]] = [
        (infer.main, "--video", clip, "--question", "What?", "--checkpoint", checkpoint),
        (needle.main, "--checkpoint", checkpoint),
        (verify.main, goldens / "tiny"),
    ]
    for main, *arguments in calls:
        assert expected in refused(main, *arguments, *flags)
    assert "--copies 2 needs 2 devices" in refused(verify.main, goldens / "tiny", "--copies", 2)


def test_the_plan_counts_each_device(command: Callable[..., tuple[int, str, str]]) -> None:
    def planned(*flags: object) -> dict[str, Any]:
        status, out, err = command(plan.main, "--device", "rtx4090", "--json", "--frames", 10000, *flags)
        assert status in (0, 1), err
        return json.loads(out)  # type: ignore[no-any-return]

    one, two = planned(), planned("--tensor", 2)
    for part in ("KV cache", "pooled KV", "mixed KV"):
        assert two["memory"][part] == one["memory"][part] / 2
    assert one["memory"]["weights"] / 2 < two["memory"]["weights"] < one["memory"]["weights"] / 2 + GIB
    assert two["seconds"]["prefill"] == pytest.approx(one["seconds"]["prefill"] / 2)
    assert not two["fits"]
    assert planned("--tensor", 2, "--offload")["fits"]
    assert planned("--tensor", 4)["fits"]


# --- work for copies of a model -------------------------------------------------------------------


def copies(count: int) -> list[Any]:
    return [SimpleNamespace(network=SimpleNamespace(mesh=None), number=i) for i in range(count)]


def test_copies_share_the_work_and_results_keep_their_order() -> None:
    """Each of three copies waits until the others have an item too."""
    together = threading.Barrier(3, timeout=30)

    def work(copy: Any, item: int) -> tuple[int, int]:
        together.wait()
        return item, copy.number

    results = share(copies(3), work, range(6))
    assert [item for item, _ in results] == list(range(6))
    assert {number for _, number in results} == {0, 1, 2}
    assert share(copies(1), lambda copy, item: (item, threading.current_thread()), [1]) == [
        (1, threading.current_thread())
    ]


def test_the_first_failure_ends_the_work() -> None:
    begun = []

    def work(copy: Any, item: int) -> None:
        begun.append(item)
        raise UserError(f"item {item}")

    with pytest.raises(UserError, match="item"):
        share(copies(2), work, range(100))
    assert len(begun) <= 2


# --- the same numbers as one device ---------------------------------------------------------------

GOLDENS = """
import json, sys, tempfile
from pathlib import Path
import jax
jax.config.update("jax_enable_x64", True)
from xl2jax.evaluation.verify import verify
from xl2jax.inference.devices import Devices
folder, sections, tensor, data, weights = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
meshes = Devices(tensor, data).meshes()
rows = []
with tempfile.TemporaryDirectory() as scratch:
    rows += verify(Path(folder), sections, Path(scratch) / "c", dtype="float64", mesh=meshes[-1],
                   weights=None if weights == "None" else weights)
print(json.dumps([[r.name, r.relative_l2, r.ok] for r in rows]))
"""


def check_goldens(folder: Path, sections: str, tensor: int, data: int, weights: str | None = None) -> None:
    rows = on_devices(GOLDENS, folder, sections, tensor, data, weights)
    assert len(rows) > 5
    assert all(ok for _, _, ok in rows), rows
    if weights is None:
        assert max(error for _, error, _ in rows) < 1e-9


@pytest.mark.slow
def test_goldens_on_two_devices(goldens: Path) -> None:
    check_goldens(goldens / "tiny", "chunked", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "copies", "sections"), [(8, 1, "dense,chunked,bilevel"), (4, 2, "chunked,bilevel"), (1, 8, "bilevel")]
)
def test_goldens_on_every_mesh_of_eight_devices(tensor: int, copies: int, sections: str, goldens: Path) -> None:
    """The last copy of the model. Of 2 KV heads 8 devices hold four copies each, and 4 devices two."""
    check_goldens(goldens / "wide", sections, tensor, copies)


@pytest.mark.slow
def test_goldens_of_quantised_matrices_on_two_devices(goldens: Path) -> None:
    check_goldens(goldens / "wide", "chunked,bilevel", 2, 1, "int8")


ANSWERS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import jax
import xl2jax
from xl2jax.inference.api import load_copies
from xl2jax.inference.copies import share
from xl2jax.inference.store import load_cache, model_key, save_cache
from xl2jax.inference.devices import Devices
checkpoint, clip, folder = map(Path, sys.argv[1:4])
weights, cache = None if sys.argv[4] == "None" else sys.argv[4], xl2jax.CacheConfig(**json.loads(sys.argv[5]))
questions = ["What?", "Who is it?", "Where?"]
one = xl2jax.load(checkpoint, weights=weights)
many = load_copies(checkpoint, Devices(2, 2), weights=weights)
key = {"prefill": {"chunk_groups": 4, "window_chunks": 3}} | model_key(one, cache)

def watch_and_ask(model, number):
    video = model.watch(clip, cache=cache)
    save_cache(folder / f"{number}.kv", video, key)
    many = model.ask_many([(video, q) for q in questions], max_new_tokens=12)
    scores = [c.score for c in many[0].chunks]
    return [a.text for a in many], scores, video.device_bytes, [str(x.sharding) for x in jax.tree.leaves(video.kv.cache.k)]

exact = one.ask(one.watch(clip), questions[0], max_new_tokens=1).chunks
results = [watch_and_ask(one, 0), *share(many, watch_and_ask, [1, 2])]
read = [load_cache(folder / f"{n}.kv", model, key, clip, xl2jax.BilevelConfig(), cache) for model, n in ((one, 2), (many[1], 0))]
with ThreadPoolExecutor(3) as pool:
    at_once = list(pool.map(lambda q: many[1].ask(read[1], q, max_new_tokens=12).text, questions))
print(json.dumps({
    "fingerprints": [m.fingerprint for m in (one, *many)],
    "results": results,
    "exact": [c.score for c in exact],
    "read": one.ask(read[0], questions[0], max_new_tokens=12).text,
    "at_once": at_once,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "cache"), [(None, {"offload": True}), ("int4", {"dtype": "int8"})])
def test_answers_and_cache_files_are_those_of_one_device(
    weights: str | None, cache: dict[str, Any], clip: Path, tmp_path: Path
) -> None:
    """Copies of two devices each. Their files and those of one device suit each other, and threads ask at once."""
    from xl2jax.testing import make_checkpoint

    base = PRESETS["tiny"]
    llm = dataclasses.replace(base.llm, width=64, heads=8, kv_heads=2, head_width=32, mlp_width=256)
    make_checkpoint(tmp_path / "model", dataclasses.replace(base, llm=llm))
    out = on_devices(ANSWERS, tmp_path / "model", clip, tmp_path, weights, json.dumps(cache), devices=4)
    assert len(set(out["fingerprints"])) == 1
    (texts, scores, size, _), *others = out["results"]
    # Another order of sums may give an element the next code of 8 bits, which moves the scores less than 8 bits do.
    rounding = np.abs(np.subtract(scores, out["exact"])).max()
    for other_texts, other_scores, other_size, shardings in others:
        assert other_texts == texts
        error = np.abs(np.subtract(other_scores, scores)).max()
        assert error <= max(1e-5 * max(scores), rounding if "dtype" in cache else 0), (error, rounding, max(scores))
        assert other_size == pytest.approx(size / 2, rel=0.01)
        assert all("'tensor'" in s for s in shardings)
    assert out["read"] == texts[0]
    assert out["at_once"] == texts


def test_each_card_of_every_copy_needs_room_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that others use refuses the model before it is read, also where it is not the first copy's."""
    need = memory.weight_bytes(RELEASED, "bfloat16", 1)

    def card(number: int, free: int) -> Any:
        stats = {"bytes_limit": 2 * need, "bytes_in_use": 2 * need - free}
        return SimpleNamespace(id=number, memory_stats=lambda: stats)

    def meshes(*free: int) -> list[Any]:
        return [SimpleNamespace(size=1, local_devices=[card(i, n)]) for i, n in enumerate(free)]

    memory.check_weights_fit(RELEASED, "bfloat16", meshes(need, need))
    with pytest.raises(UserError, match=r"the model needs .* are free"):
        memory.check_weights_fit(RELEASED, "bfloat16", meshes(need, need - 1))
