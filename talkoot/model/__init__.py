"""A trained model as a folder of standard files: exported from a swarm, opened, served, and founding another swarm."""
