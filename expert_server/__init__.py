"""The role of a node: hosts experts, and computes them for trainers."""
