"""Makes the bundled checkpoint: python -m xl2jax.recipes.demo build/demo"""

from __future__ import annotations

from xl2jax.system.terminal import run_command


def main() -> None:
    import tyro

    from xl2jax.recipes.demo.stages import RecipeArgs, run_recipe

    run_recipe(tyro.cli(RecipeArgs, prog="python -m xl2jax.recipes.demo"))


if __name__ == "__main__":
    run_command(main)
