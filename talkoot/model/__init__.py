"""A trained model as a folder of standard files: exported from a swarm, opened, served, and used to found another
swarm.
"""
