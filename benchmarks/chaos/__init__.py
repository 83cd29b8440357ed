"""A swarm with every kind of failure that happens in practice, compared with an undisturbed one."""
