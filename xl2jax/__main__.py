"""`xl2jax COMMAND ...`, or `python -m xl2jax COMMAND ...`: runs a command of the package."""

from __future__ import annotations

import importlib
import sys

from xl2jax.errors import UserError
from xl2jax.system.terminal import run_command

COMMANDS = {
    "infer": ("xl2jax.commands.infer", "main", "answers questions about a video"),
    "serve": ("xl2jax.commands.serve", "main", "answers questions about videos over HTTP"),
    "run-batch": ("xl2jax.commands.run_batch", "main", "answers a file of chat requests"),
    "ray-batch": ("xl2jax.commands.ray_batch", "main", "answers a file of questions on a Ray cluster"),
    "ray-serve": ("xl2jax.commands.ray_serve", "main", "answers questions over HTTP on a Ray cluster"),
    "demo-clip": ("xl2jax.commands.demo_clip", "main", "writes a video for a first try, with questions about it"),
    "train": ("xl2jax.commands.train", "main", "fine-tunes the model"),
    "convert": ("xl2jax.commands.convert", "main", "converts checkpoints between PyTorch and Orbax"),
    "verify": ("xl2jax.commands.verify", "main", "compares every stage with upstream's tensors"),
    "plan": ("xl2jax.commands.plan", "main", "predicts memory and time of a video"),
    "needle": ("xl2jax.commands.needle", "main", "measures needle retrieval in videos"),
    "eval": ("xl2jax.commands.evaluate", "main", "measures the model on benchmarks in local files"),
    "bench": ("xl2jax.bench.command", "main", "times prefill, decoding, kernels and the whole model"),
}


def dispatch() -> int | None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: xl2jax COMMAND [OPTIONS]    (xl2jax COMMAND --help lists the options)\n")
        print(*(f"  {command:10} {summary}" for command, (_, _, summary) in COMMANDS.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}: choose from {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[name]
    sys.argv = [f"xl2jax {name}", *sys.argv[2:]]
    result: int | None = getattr(importlib.import_module(module), function)()
    return result


def main() -> None:
    run_command(dispatch)


if __name__ == "__main__":
    main()
