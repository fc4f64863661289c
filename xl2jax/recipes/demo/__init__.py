"""The recipe of the bundled checkpoint (checkpoints/demo): python -m xl2jax.recipes.demo build/demo"""
