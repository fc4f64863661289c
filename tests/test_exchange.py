"""What devices exchange in compiled programs of inference and training, and that the kernels are in them."""

from __future__ import annotations

import pytest
from virtual_devices import on_devices

from xl2jax.config import PRESETS

RELEASED = PRESETS["video-xl-2"]

PROGRAMS = """
import collections, dataclasses, functools, json, re, sys
import jax
import jax.experimental.mosaic.gpu.utils as mosaic_utils
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from xl2jax.config import PRESETS
from xl2jax.inference import compiled, prefill
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.network import Network
from xl2jax.models.param_tree import flatten, unflatten
from xl2jax.models.sharding import inference_sharding, tensor_mesh
from xl2jax.models.video_xl2 import abstract_model
from xl2jax.ops import quantized_product
from xl2jax.ops.attention import Attention

name, weights, kept = sys.argv[1], None if sys.argv[2] == "None" else sys.argv[2], sys.argv[3]
if name != "blockwise":
    mosaic_utils._infer_arch = lambda: (9, 0)
    quantized_product.cuda_capability = lambda: (9, 0)
released = PRESETS["video-xl-2"]
config = dataclasses.replace(released, llm=dataclasses.replace(released.llm, layers=2, weights=weights))
mesh, struct = tensor_mesh(jax.devices()), jax.ShapeDtypeStruct
stored = flatten(nnx.state(abstract_model(config, jnp.bfloat16)))
params = {n: struct(x.shape, x.dtype, sharding=inference_sharding(n, x.shape, mesh)) for n, x in stored.items()}
network = Network(config, unflatten(params, config), Attention(name), "gpu", mesh)

def placed(tree):
    def one(x):
        spec = PartitionSpec(None, "tensor") if x.ndim >= 3 else PartitionSpec()
        return struct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(one, tree)

answers, quantized = 8, kept == "int8"
contexts = placed(jax.eval_shape(functools.partial(
    compiled.empty_rows, config.llm, answers, 6144, "bfloat16", quantized=quantized)))
state, sampling = placed(jax.eval_shape(
    lambda: compiled.empty_state(config.llm, answers, 512, "bfloat16", separate=False)))
limits, stop = (struct((n,), jnp.int32) for n in (answers, 1))
layout = VideoLayout(14, (9,) * 128, 144)
plan = prefill.make_plan(layout, PrefillConfig(), "gpu")
cache = placed(jax.eval_shape(functools.partial(
    compiled.new_cache, config.llm, plan.slots, "bfloat16", plan.visual_start, quantized=quantized)))
segment = next(prefill.segments(prefill.steps(layout, plan, [[0] * 9] * 128), plan))
visual = struct((plan.segment_groups, 144, config.llm.width), jnp.bfloat16)
traced = {
    "decode": compiled.decode.trace(network, None, contexts, state, limits, stop, sampling, size=8),
    "prefill": compiled.prefill_segment.trace(network, cache, visual, segment),
}
out = {}
for program, t in traced.items():
    if name == "blockwise":
        lowered = t.lower().compile()
        text = lowered.as_text()
        kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
        found = re.findall(rf"= \\(?\\w+(\\[[\\d,]*\\])[^=\\n]*? ({kinds})(?:-start)?\\(", text)
        out[program] = sorted(collections.Counter(f"{kind} {shape}" for shape, kind in found).items())
        if program == "decode":
            out["gathered"] = [line for line in text.splitlines() if " all-gather" in line]
    else:
        text = t.lower(lowering_platforms=("cuda",)).as_text()
        out[program] = {n: text.count(n) for n in ("custom_call @mosaic_gpu", "call @_attend(", "call @_by_kernel")}
print(json.dumps(out))
"""


@pytest.mark.slow
def test_only_what_must_be_is_exchanged() -> None:
    """With the released widths and 2 layers: a sum of activations behind each half of a layer and the embedding, and what
    each device found to be its largest logit. Neither weights nor KV leave their device. Logits are gathered only in the
    branch that draws from them."""
    out = on_devices(PROGRAMS, "blockwise", None, None, devices=2)
    width, vocab, step = RELEASED.llm.width, RELEASED.llm.vocab, 32 * (144 + 12)
    assert out["decode"] == [
        [f"all-gather [8,{vocab}]", 1],
        ["all-reduce [2,3,8]", 1],
        [f"all-reduce [8,{width}]", 5],
    ]
    assert all("/branch_0_fun/" in line for line in out["gathered"] if "op_name" in line)
    assert out["prefill"] == [  # the scan over layers is compiled once
        [f"all-reduce [{32 * 12},{width}]", 1],
        [f"all-reduce [{step},{width}]", 2],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "devices", "weights", "kept"),
    [("wgmma", 2, None, None), ("wgmma", 4, "int8", "int8"), ("mma", 2, "int4", None)],
)
def test_split_programs_are_lowered_with_the_kernels(
    attention: str, devices: int, weights: str | None, kept: str | None
) -> None:
    """At the released widths, for CUDA: each device attends with its own heads, and multiplies with its own codes."""
    out = on_devices(PROGRAMS, attention, weights, kept, devices=devices)
    assert out["decode"]["call @_attend("] == 2
    assert out["prefill"]["custom_call @mosaic_gpu"] == 2  # of visual tokens and of time tokens
    # Query, key and value together, the projection out, gate and up together, down; and lm_head.
    assert out["decode"]["call @_by_kernel"] == (0 if weights is None else 2 * 4 + 1)


LARGEST = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from xl2jax.inference.generate import best
from xl2jax.models.sharding import tensor_mesh
from xl2jax.ops.split import look_up, part_of

mesh = tensor_mesh(jax.devices())
rows = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
rows[1, [5, 20, 50]] = 9.0  # equals on several devices
rows[2, 40] = np.inf
rows[3, 10] = -np.inf
rows[4, 63] = np.nan
rows[5] = -1e30
table, ids = np.arange(64 * 3, dtype=np.float32).reshape(64, 3), np.array([[0, 15], [16, 63]])

def put(x, axis):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, part_of(axis)))

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    found, finite = jax.jit(best)(put(rows, 1))
    looked_up = jax.jit(lambda t, ids: look_up(lambda t, i: t[i], t, ids))(put(table, 0), ids)
print(json.dumps({
    "ids": found.tolist(), "finite": finite.tolist(), "alone": jnp.argmax(rows, -1).tolist(),
    "rows": np.array_equal(looked_up, table[ids]),
}))
"""


def test_split_logits_and_embeddings_are_those_of_one_device() -> None:
    out = on_devices(LARGEST, devices=4)
    same = [0, 1, 2, 3, 5, 6, 7]  # row 4 holds a nan
    assert [out["ids"][i] for i in same] == [out["alone"][i] for i in same]
    assert out["finite"] == [True, True, False, False, False, True, True, True]
    assert out["rows"]


TRAINING = """
import collections, dataclasses, json, re, sys
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
from xl2jax.bench.train import _batch
from xl2jax.config import PRESETS
from xl2jax.models.sharding import param_sharding
from xl2jax.training.config import PRESETS as TRAINING, trained_names
from xl2jax.training.sharding import batch_sharding, make_mesh
from xl2jax.training.state import abstract_state, parameter_shapes
from xl2jax.training.step import StepConfig, Steps, learning_rate, optimizer

fsdp, tensor, rank, remat = map(int, sys.argv[1:])
model = PRESETS["tiny"]
config = dataclasses.replace(TRAINING["stage4"], checkpoint="random", data=Path(), output=Path(), fsdp=fsdp, tensor=tensor,
    compute_dtype="float32", lora_rank=rank, train=None)
mesh = make_mesh(fsdp, tensor)
shapes = parameter_shapes(model, config.lora)
names = trained_names(config, list(shapes))
tx, schedule = optimizer(config, names, 10), learning_rate(config, 10)
abstract = abstract_state({n: shapes[n] for n in names}, tx, mesh)
frozen = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=param_sharding(n, s.shape, mesh))
    for n, s in shapes.items() if n not in names}
rows = mesh.shape["data"] * mesh.shape["fsdp"]
batch = _batch(rows, 40, model.visual_tokens, model.vision.image_size, model.llm.vocab, 8)
batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch)
steps = Steps(StepConfig(model, config.lora, "float32", remat=bool(remat)), tx, schedule, abstract)
with jax.set_mesh(mesh):
    text = steps._whole.lower(abstract, frozen, *batch).compile().as_text()
found = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\\(", text)
arrays = [tuple(int(n) for n in dims.split(",") if n) for types, _ in found for dims in re.findall(r"\\[([\\d,]*)\\]", types)]

largest = max(int(np.prod(s.shape)) for s in shapes.values())
split = [s.shape for n, s in shapes.items() if ".layers." in n and "fsdp" in param_sharding(n, s.shape, mesh).spec]
head = "[" + ",".join(map(str, shapes["llm.lm_head.kernel"].shape[::-1])) + "]"
print(json.dumps({
    "kinds": sorted({kind for _, kind in found}), "others": sorted({str(a) for a in arrays if np.prod(a) > largest}), "count": len(arrays),
    "stacked": sorted({str(shape) for shape in split if "[" + ",".join(map(str, shape)) + "]" in text}),
    "heads": [line for line in text.splitlines() if " all-reduce" in line and head in line and "while/body" in line],
    "activations": batch[0].shape[1] * model.vision.patch_grid**2 * model.vision.width / largest, "tokens": batch[1].ids.shape[1],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "remat"), [(0, True), (4, True), (0, False)])
def test_fsdp_exchanges_parameters_and_gradients(rank: int, remat: bool) -> None:
    """Each device computes its own rows of the batch with whole matrices, one layer at a time. Without a word XLA splits
    activations along the inputs of the vision tower's matrices instead, has every device compute all rows, and sums the
    activations. The gradient of lm_head is not summed in every block of tokens."""
    out = on_devices(TRAINING, 4, 1, rank, int(remat), devices=4)
    assert out["stacked"] == []
    assert out["heads"] == []
    assert out["count"] > 20
    assert out["activations"] > 2
    # Embeddings of the text are looked up where their channels are, and then exchanged.
    others = [shape for shape in out["others"] if str(out["tokens"]) not in shape]
    assert not others, others


@pytest.mark.slow
def test_tensor_sums_activations_only() -> None:
    """Each device attends with its own heads, and what they return is not gathered."""
    assert on_devices(TRAINING, 1, 2, 0, 1, devices=2)["kinds"] == ["all-reduce"]
