"""Peak memory of converting a 1.5 GiB checkpoint in many shards: `python tests/convert_memory.py`.

Not a test that CI runs (it writes 4.5 GiB). Prints what each direction used above the imports; the
target is 600 MiB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.torch_folder import write_torch
from xl2jax.config import PRESETS, LLMConfig, VideoXL2Config

CONFIG = VideoXL2Config(
    vision=PRESETS["tiny"].vision,
    grid=4,
    llm=LLMConfig(vocab=512, width=1024, mlp_width=2816, layers=36, heads=16, kv_heads=4, head_width=64),
)


def measured(*argv: str) -> None:
    """Runs in a new process. Returns its peak memory minus that of the imports."""
    from xl2jax.checkpoint import convert

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.argv = ["convert", *argv]
    convert.main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(peak - before) / 1024:.0f} MiB above the imports: {' '.join(argv)}")


def main() -> None:
    def read(entry: Entry) -> np.ndarray:
        return np.random.default_rng(len(entry.name)).standard_normal(entry.shape, np.float32)

    with tempfile.TemporaryDirectory() as scratch:
        source, orbax, back = (str(Path(scratch, n)) for n in ("torch", "orbax", "back"))
        write_torch(Path(source), CONFIG, read, "float32", shard_bytes=64 << 20)
        files = list(Path(source).glob("*.safetensors"))
        print(f"{sum(f.stat().st_size for f in files) / 2**30:.2f} GiB in {len(files)} shards")
        for argv in ((source, orbax), (orbax, back, "--reverse")):
            subprocess.run([sys.executable, __file__, *argv], check=True)


if __name__ == "__main__":
    measured(*sys.argv[1:]) if len(sys.argv) > 1 else main()
