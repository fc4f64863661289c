"""`python train.py --preset stage4 --checkpoint DIR --data data.yaml --output DIR`: fine-tunes the model."""

from xl2jax.system.terminal import run_command


def main() -> int:
    from xl2jax.commands.train import main as train

    return train()


if __name__ == "__main__":
    run_command(main)
