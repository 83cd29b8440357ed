"""The role of a node: it hosts experts, and computes them for trainers."""
