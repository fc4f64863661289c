"""Times loading a converted checkpoint in 16 and in 8 bits: layers of the released width, random weights.

python tools/loading_time.py [LAYERS [FOLDER]]

Each load runs in a process of its own, in turns, and the fastest of each kind counts, so that files come from the page
cache where it has room for them.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.config import PRESETS, Weights
from xl2jax.testing import make_checkpoint

LAYERS, REPEATS = 6, 3  # the released model has 28 layers, which take 30 GB of disk and minutes to write
_LOAD = """
import sys, time, jax, xl2jax
started = time.perf_counter()
jax.block_until_ready(xl2jax.load(sys.argv[1]).params)
print(time.perf_counter() - started)
"""


def seconds(folder: Path) -> float:
    """One load of a checkpoint."""
    run = subprocess.run([sys.executable, "-c", _LOAD, folder], check=True, stdout=subprocess.PIPE, text=True)
    return float(run.stdout)


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else LAYERS
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder, released = Path(name), PRESETS["video-xl-2"]
        config = dataclasses.replace(released, llm=dataclasses.replace(released.llm, layers=layers))
        make_checkpoint(folder / "torch", config, dtype="bfloat16")
        kinds: dict[str, Weights | None] = {"bfloat16": None, "int8": "int8"}
        for kind, weights in kinds.items():
            torch_to_orbax(folder / "torch", folder / kind, "bfloat16", weights)
        shutil.rmtree(folder / "torch")
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(REPEATS):
            for kind, runs in times.items():
                runs.append(seconds(folder / kind))
        for kind, runs in times.items():
            size = sum(file.stat().st_size for file in (folder / kind).rglob("*") if file.is_file())
            ratio = min(runs) / min(times["bfloat16"])
            print(f"{kind}: {size / 1e9:.2f} GB, {min(runs):.2f} s, {ratio:.2f} of bfloat16 (runs: {runs})")


if __name__ == "__main__":
    main()
