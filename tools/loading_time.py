"""Times loading a converted checkpoint in 16 and in 8 bits: a few layers of the released width, random weights.

python tools/loading_time.py [FOLDER]

Each load runs in a process of its own, and the fastest of three counts, so that files come from the page cache.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.config import PRESETS, Weights
from xl2jax.testing import make_checkpoint

LAYERS, REPEATS = 6, 3
_LOAD = """
import sys, time, jax, xl2jax
started = time.perf_counter()
jax.block_until_ready(xl2jax.load(sys.argv[1]).params)
print(time.perf_counter() - started)
"""


def seconds(folder: Path) -> float:
    """The fastest load of a checkpoint."""
    runs = [
        subprocess.run([sys.executable, "-c", _LOAD, folder], check=True, capture_output=True, text=True)
        for _ in range(REPEATS)
    ]
    return min(float(run.stdout) for run in runs)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder, released = Path(name), PRESETS["video-xl-2"]
        config = dataclasses.replace(released, llm=dataclasses.replace(released.llm, layers=LAYERS))
        make_checkpoint(folder / "torch", config, dtype="bfloat16")
        kinds: tuple[Weights | None, ...] = (None, "int8")
        times = []
        for weights in kinds:
            target = folder / (weights or "bfloat16")
            torch_to_orbax(folder / "torch", target, "bfloat16", weights)
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            times.append(seconds(target))
            print(
                f"{target.name}: {size / 1e9:.2f} GB, {times[-1]:.2f} s, {times[-1] / times[0]:.2f} of bfloat16",
                flush=True,
            )


if __name__ == "__main__":
    main()
