"""Checkpoints: where they come from, how they are read and written, and the names of parameters on both sides."""
