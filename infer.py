"""`python infer.py --video clip.mp4 --question "..."`: answers on stdout, everything else on stderr."""

from xl2jax.system.terminal import run_command


def main() -> int:
    from xl2jax.commands import infer

    return infer.main()


if __name__ == "__main__":
    run_command(main)
