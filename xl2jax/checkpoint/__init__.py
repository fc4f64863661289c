"""Checkpoints: finding, reading, writing and converting them, and the parameter names in both layouts."""
