"""Runs the same small swarm with real processes and in the simulation, and compares the results."""
