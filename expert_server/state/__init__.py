"""Checkpoints of experts on disk, and state passed between nodes."""
