"""`python -m xl2jax bench prefill|decode|kernels|e2e`: what everything costs, on random weights."""
