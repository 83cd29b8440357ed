"""The same small swarm with real processes and in the simulation, and how far the two are apart."""
