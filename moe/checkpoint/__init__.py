"""Checkpoints: what is saved, and whether it can be trusted."""
