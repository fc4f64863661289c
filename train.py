"""`python train.py --preset stage4 --checkpoint DIR --data data.yaml --output DIR`: fine-tunes the model."""

import sys

from xl2jax.terminal import run_command


def main() -> int:
    from xl2jax.training.config import parse
    from xl2jax.training.run import train

    return train(parse(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
