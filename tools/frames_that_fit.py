"""Prints the table "Frames that fit" of docs/performance.md: the largest numbers that `xl2jax plan` gives, by card.

python tools/frames_that_fit.py
"""

from __future__ import annotations

import dataclasses

from xl2jax.commands.plan import PlanArgs, largest, layout_of
from xl2jax.config import PRESETS, Weights

FRAMES = 120_000
CARDS: dict[str, tuple[str, tuple[Weights | None, ...]]] = {
    "rtx3060-12g": ("RTX 3060, 12 GB", ("int4",)),
    "rtx4060ti-16g": ("RTX 4060 Ti or 5060 Ti, 16 GB", ("int8", "int4")),
    "l4": ("L4, 24 GB", (None, "int8", "int4")),
    "rtx4090": ("RTX 3090 or 4090, 24 GB", (None, "int8", "int4")),
    "rtx5090": ("RTX 5090, 32 GB", (None, "int8")),
    "a100-40g": ("A100, 40 GB", (None, "int8")),
    "l40": ("L40, 48 GB", (None, "int8")),
    "a100-80g": ("A100, 80 GB", (None, "int8")),
    "h100": ("H100, 80 GB", (None, "int8")),
    "h200": ("H200, 141 GB", (None, "int8")),
}


def main() -> None:
    config = PRESETS["video-xl-2"]
    layout = layout_of(config, None, FRAMES, 1.0)
    print("| card | weights | default | `--cache-dtype int8` | `--offload` | both |")
    print("| --- | --- | --- | --- | --- | --- |")
    for device, (name, kinds) in CARDS.items():
        for number, weights in enumerate(kinds):
            args = dataclasses.replace(PlanArgs(), device=device, weights=weights)  # type: ignore[arg-type]
            cells = [
                f"{largest(config, layout, dataclasses.replace(args, cache_dtype=dtype, offload=offload)):,}"
                for offload in (False, True)
                for dtype in (None, "int8")
            ]
            print(f"| {'' if number else name} | {weights or '16 bits'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
