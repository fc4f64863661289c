"""Attention: one signature, several implementations."""
