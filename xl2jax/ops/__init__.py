"""Attention: arena attention with one signature and several implementations, and dense attention."""
