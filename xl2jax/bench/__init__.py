"""Benchmarks on random weights: `xl2jax bench prefill|decode|read|kernels|e2e|train`."""
