"""Checkpoints of experts on disk, and states sent between nodes."""
