"""A swarm in which everything goes wrong that does in the world, beside a calm one."""
