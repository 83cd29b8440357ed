"""A swarm of thousands of volunteers, simulated with the real code."""
