"""Dumps a verification case from the PyTorch release of Video-XL-2, for `xl2jax verify`. Needs torch; see docs/cases.md.

python tools/dump_case.py repository CHECKPOINT CASE_FOLDER    # the code of the repository VectorSpaceLab/Video-XL
python tools/dump_case.py hub CHECKPOINT CASE_FOLDER           # the code that the hub ships with the weights
python tools/dump_case.py inspect CHECKPOINT                   # what the hub's code has, before anything is dumped

The script imports nothing of xl2jax, so that it runs in upstream's own environment. The names of upstream's functions in
`repository` mode were read in its source. Nobody has run this script on the released weights yet; the hub's code has not
been read at all, and `hub` mode is written to find out what it does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

GROUP, VISUAL_TOKENS, VIDEO_ID, PLACEHOLDER = 4, 144, -200, 151654
IMAGE_SIZE = 384
PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
SUFFIX = "\n{question}<|im_end|>\n<|im_start|>assistant\n"


def case_pixels(frames: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """The pixels of every case, float32 [F, 3, H, W]. They are not stored: `xl2jax verify` computes the same."""
    f, c, y, x = np.ogrid[:frames, :3, :size, :size]
    value = np.sin(0.05 * (c + 1) * x + 0.03 * y + 0.4 * f) * np.cos(0.02 * (f + 1) * y - 0.3 * c)
    return value.astype(np.float32)


def token_ids(tokenizer: Any, frames: int, question: str) -> tuple[list[int], list[int], list[int]]:
    """(input ids with VIDEO_ID for the video, ids of the video, time tokens of each group), a frame a second."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    times = [encode(f"Time {float(second)}s:") for second in range(0, frames, GROUP)]
    video = [i for ids in times for i in [*ids, *[PLACEHOLDER] * VISUAL_TOKENS]]
    return [*encode(PREFIX), VIDEO_ID, *encode(SUFFIX.format(question=question))], video, [len(t) for t in times]


def to_numpy(x: Any) -> np.ndarray:
    """A tensor as a numpy array; floating point becomes float32 unless it is float64."""
    import torch

    x = x.detach().cpu()
    return x.float().numpy() if x.dtype in (torch.float16, torch.bfloat16) else x.numpy()


class Recorder:
    """Records what named modules give, through forward hooks; parts of a video are joined."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}
        self._handles: list[Any] = []

    def add(self, name: str, x: Any) -> None:
        self.parts.setdefault(name, []).append(to_numpy(x))

    def watch(self, module: Any, name: str, inputs: str | None = None) -> None:
        def hook(_: Any, args: tuple[Any, ...], output: Any) -> None:
            if inputs is not None:
                self.add(inputs, args[0])
            self.add(name, output)

        self._handles.append(module.register_forward_hook(hook))

    def stages(self, frames: int) -> dict[str, np.ndarray]:
        """The stages of the vision side in the shapes that a case stores."""
        joined = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        out = {"vision_features": joined["vision_features"][:frames]}
        grouped = joined["dts_input"]  # [G, C, 4, H, W] is a view of [F, C, H, W]
        out["interpolated"] = grouped.reshape(-1, grouped.shape[1], *grouped.shape[3:])[:frames]
        out["dts"] = joined["dts"].squeeze(2)
        out["projected"] = joined["projected"]
        return out

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def wrapped(owner: Any, name: str, see: Any) -> Any:
    """While the block runs, `see` gets the result of each call of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)  # generate() looks at the signature
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        see(result)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def watch_stages(model: Any) -> Recorder:
    """Hooks on the vision side. The names of the modules are those of the checkpoint's tensors."""
    recorder, parts = Recorder(), model.model
    recorder.watch(parts.vision_tower, "vision_features")
    recorder.watch(parts.sae, "dts", inputs="dts_input")
    recorder.watch(parts.mm_projector, "projected")
    return recorder


def pairs_of(numbers: list[str]) -> list[tuple[int, int]]:
    """Chunk groups and window chunks of each setting: `4,3` is (4, 3)."""
    return [(int(a), int(b)) for a, _, b in (n.partition(",") for n in numbers)]


class Writer:
    """Writes a case folder."""

    def __init__(self, folder: Path, checkpoint: Path, ids: list[int], video: list[int], case: dict[str, Any]):
        from safetensors.numpy import save_file

        self._save, self._folder = save_file, folder
        (folder / "expected").mkdir(parents=True)
        os.symlink(checkpoint.resolve(), folder / "checkpoint", target_is_directory=True)
        inputs = {"input_ids": np.array(ids, np.int64), "group_ids": np.array(video, np.int64)}
        save_file(inputs, folder / "inputs.safetensors")
        (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")

    def section(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        place = self._folder / "expected" / f"{name}.safetensors"
        self._save({k: np.ascontiguousarray(x) for k, x in tensors.items()}, place)
        print(f"wrote {place}: {', '.join(tensors)}", file=sys.stderr)

    def raw(self, tensors: dict[str, np.ndarray]) -> None:
        """Beside expected/, where `xl2jax verify` does not look."""
        self._save({k: np.ascontiguousarray(x) for k, x in tensors.items()}, self._folder / "raw.safetensors")


def dump_repository(args: argparse.Namespace) -> None:
    """From Video-XL-2/eval/lvu/w_chunk_bilevel, which must be on PYTHONPATH."""
    import torch
    from transformers import AutoTokenizer
    from videoxl2.videoxl2.model.language_model.llava_qwen import LlavaQwenForCausalLM

    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, use_fast=False)
    model = LlavaQwenForCausalLM.from_pretrained(args.checkpoint, torch_dtype=dtype, attn_implementation=args.attention)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    model = model.to(args.device, dtype).eval()

    ids, video, times = token_ids(tokenizer, args.frames, args.question)
    settings = pairs_of(args.prefill)
    bilevel = [
        {"prefill": {"chunk_groups": c, "window_chunks": w}, "selected_units": args.units,
         "select_chunk_groups": args.select_chunk_groups, "pool": args.pool}
        for c, w in settings[:1]
    ]  # fmt: skip
    writer = Writer(args.folder, args.checkpoint, ids, video, case_of(args, times, settings, bilevel))
    pixels = torch.from_numpy(case_pixels(args.frames)).to(args.device, dtype)
    input_ids = torch.tensor([ids], device=args.device)
    video_ids = torch.tensor(video, device=args.device)

    def generate(**options: Any) -> Any:
        return model.generate(
            input_ids, images=[pixels], modalities=["video"], time_embedding=[video_ids], do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, max_new_tokens=args.new_tokens, use_cache=True, **options,
        )  # fmt: skip

    with torch.inference_mode():
        # Dense: without a selection upstream runs plain causal attention.
        recorder, embeddings, pooled = watch_stages(model), [], []
        with (
            wrapped(model, "prepare_inputs_labels_for_multimodal", lambda result: embeddings.append(result[4])),
            wrapped(model, "get_2dPool", lambda result: pooled.append(to_numpy(result))),
        ):
            generated = generate()
        recorder.close()
        embedded = next(e for e in embeddings if e is not None)
        positions = torch.arange(embedded.shape[1], device=args.device)[None]
        logits = model(
            inputs_embeds=embedded, attention_mask=torch.ones_like(positions), position_ids=positions, use_cache=False,
        ).logits  # fmt: skip
        dense = recorder.stages(args.frames) | {"visual_tokens": np.concatenate(pooled)}
        dense |= {"inputs_embeds": to_numpy(embedded[0]), "logits": to_numpy(logits[0])}
        writer.section("dense", dense | {"generated": to_numpy(generated[0])})

        def chunked(chunk: int, window: int, units: list[int], size: int, pool: int) -> dict[str, np.ndarray]:
            """One run with chunked prefill, then bi-level decoding; no unit at all keeps every block dense."""
            heads, masks, caches = [], [], []

            def keep_cache(result: Any) -> None:
                if not caches:  # the first call ends with the suffix behind the mixed cache
                    kv = result.past_key_values
                    caches.append([to_numpy(x[0]) for x in (*kv[0], *kv[-1])])

            handle = model.lm_head.register_forward_hook(lambda _m, _i, out: heads.append(to_numpy(out[0])))
            with (
                wrapped(model, "get_sparse_attention_mask", lambda r: masks.append(to_numpy(r[0][0, 0] == 0))),
                wrapped(model, "forward", keep_cache),
            ):
                ids = generate(
                    prev_blocks_num=window, block_size_chosed=chunk, selected_unit_indices=units,
                    selected_config={"selected_topk": len(units), "selected_chunk_size": size, "compression": pool},
                )  # fmt: skip
            handle.remove()
            names = ("layer0_keys", "layer0_values", "last_keys", "last_values")
            return dict(zip(names, caches[0], strict=True)) | {
                "mask": masks[0].astype(np.uint8), "logits": heads[0], "suffix_logits": heads[1], "generated": to_numpy(ids[0])
            }  # fmt: skip

        out = {}
        for c, w in settings:
            run = chunked(c, w, [], args.select_chunk_groups, args.pool)
            out |= {f"{name}_chunk{c}_prev{w}": run[name] for name in ("logits", "mask", "generated")}
        writer.section("chunked", out)
        out = {}
        for i, entry in enumerate(bilevel):
            c, w = entry["prefill"]["chunk_groups"], entry["prefill"]["window_chunks"]
            run = chunked(c, w, args.units, args.select_chunk_groups, args.pool)
            out |= {f"bilevel{i}_{name}": x for name, x in run.items() if name not in ("mask", "logits")}
        writer.section("bilevel", out)


def load_hub(args: argparse.Namespace) -> Any:
    """The model with the code that the hub ships."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        trust_remote_code=True,
        torch_dtype=getattr(torch, args.dtype),
        attn_implementation=args.attention,
    )
    model.config.enable_chunk_prefill = True
    model.config.prefill_config = {
        "chunk_prefill_mode": "streaming", "chunk_size": 4, "step_size": 1, "offload": True,
        "chunk_size_for_vision_tower": 24,
    }  # fmt: skip
    return model.to(args.device).eval()


def dump_hub(args: argparse.Namespace) -> None:
    """Calls the hub's `chat` on a video, with the pixels of the case in place of the video's own."""
    import torch
    from transformers import AutoTokenizer

    if args.video is None:
        sys.exit("hub mode needs --video: any file that gives --frames frames")
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    model = load_hub(args)
    ids, video, times = token_ids(tokenizer, args.frames, args.question)
    writer = Writer(args.folder, args.checkpoint, ids, video, case_of(args, times, [], []))
    pixels, seen, heads, embedded = torch.from_numpy(case_pixels(args.frames)), 0, [], []

    def replace(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal seen
        count, seen = len(inputs[0]), seen + len(inputs[0])
        return (pixels[seen - count : seen].to(inputs[0]), *inputs[1:])

    calls: list[tuple[int, int, int]] = []

    def count(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else options["hidden_states"]
        places = options.get("position_ids")
        ends = (-1, -1) if places is None else (int(places.min()), int(places.max()))
        calls.append((hidden.shape[1], *ends))

    recorder = watch_stages(model)
    handles = [
        model.model.layers[0].register_forward_pre_hook(count, with_kwargs=True),
        model.model.vision_tower.register_forward_pre_hook(replace),
        model.lm_head.register_forward_hook(lambda _m, _i, out: heads.append(to_numpy(out[0, -1]))),
        model.model.embed_tokens.register_forward_hook(lambda _m, i, _o: embedded.append(to_numpy(i[0].flatten()))),
    ]
    with torch.inference_mode():
        answer = model.chat(
            str(args.video), tokenizer, args.question, chat_history=None, return_history=False,
            max_num_frames=args.frames, sample_fps=args.sample_fps, max_sample_fps=4,
            generation_config={"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": args.new_tokens},
        )  # fmt: skip
    for handle in handles:
        handle.remove()
    recorder.close()
    print(f"answer: {answer}", file=sys.stderr)
    if seen != args.frames:
        print(
            f"warning: the vision tower saw {seen} frames, not {args.frames}: choose another --video", file=sys.stderr
        )
    writer.section("dense", recorder.stages(args.frames))
    # The rest has no agreed counterpart yet: see docs/cases.md on what to compare it with.
    writer.raw(
        {"embedded_ids": np.concatenate(embedded).astype(np.int64), "last_logits": np.stack(heads)}
        | {"calls": np.array(calls, np.int64)}
        | {f"part{i}_{n}": x for n, parts in recorder.parts.items() for i, x in enumerate(parts)}
    )


def inspect_hub(args: argparse.Namespace) -> None:
    """Prints where the hub's code lies, its signatures, and the modules that the hooks need."""
    model = load_hub(args)
    print(f"code: {inspect.getsourcefile(type(model))}")
    for name in ("chat", "generate", "forward", "prepare_inputs_labels_for_multimodal", "get_2dPool"):
        method = getattr(type(model), name, None)
        print(f"{name}{inspect.signature(method) if method else ': not there'}")
    names = {name for name, _ in model.named_modules()}
    for name in ("model.vision_tower", "model.sae", "model.mm_projector", "model.embed_tokens", "lm_head"):
        print(f"{name}: {'there' if name in names else 'not there'}")


def case_of(
    args: argparse.Namespace, times: list[int], settings: list[tuple[int, int]], bilevel: list[dict[str, Any]]
) -> dict[str, Any]:
    """case.json."""
    return {
        "name": args.folder.name, "frames": args.frames, "image_size": IMAGE_SIZE, "tokens_per_group": VISUAL_TOKENS,
        "time_token_lengths": times, "pad_token_id": PLACEHOLDER, "new_tokens": args.new_tokens,
        "prefill": [{"chunk_groups": c, "window_chunks": w} for c, w in settings], "bilevel": bilevel,
        "source": {"mode": args.mode, "dtype": args.dtype, "attention": args.attention, "question": args.question},
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("mode", choices=("repository", "hub", "inspect"))
    out.add_argument("checkpoint", type=Path, help="folder of the released weights")
    out.add_argument("folder", type=Path, nargs="?", help="case folder to make")
    out.add_argument("--frames", type=int, default=32, help="a multiple of 4; logits take 0.6 MB a token")
    out.add_argument("--question", default="What happens in the video?")
    out.add_argument("--new-tokens", type=int, default=16)
    out.add_argument("--prefill", nargs="+", default=["2,1", "2,3"], help="chunk groups,window chunks of each setting")
    out.add_argument("--units", type=int, nargs="+", default=[2], help="selected units (2 groups) of the bi-level case")
    out.add_argument("--select-chunk-groups", type=int, default=2)
    out.add_argument("--pool", type=int, default=4)
    out.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    out.add_argument("--attention", default="eager", help="upstream's attn_implementation")
    out.add_argument("--device", default="cpu")
    out.add_argument("--video", type=Path, help="of hub mode")
    out.add_argument("--sample-fps", type=float, default=1.0, help="of hub mode")
    return out


def main() -> None:
    args = parser().parse_args()
    if args.frames < GROUP or args.frames % GROUP:
        sys.exit(f"--frames must be a multiple of {GROUP}, not {args.frames}")
    if args.mode != "inspect" and (args.folder is None or args.folder.exists()):
        sys.exit("name a case folder that does not exist yet")
    {"repository": dump_repository, "hub": dump_hub, "inspect": inspect_hub}[args.mode](args)


if __name__ == "__main__":
    main()
