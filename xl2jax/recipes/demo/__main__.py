"""Makes the bundled checkpoint: python -m xl2jax.recipes.demo build/demo"""

from __future__ import annotations

from xl2jax.system.terminal import flag_errors, run_command


def main() -> None:
    import tyro

    from xl2jax.recipes.demo.stages import RecipeArgs, run_recipe

    with flag_errors():
        args = tyro.cli(RecipeArgs, prog="python -m xl2jax.recipes.demo")
    run_recipe(args)


if __name__ == "__main__":
    run_command(main)
