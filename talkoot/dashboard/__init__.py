"""A page and an interface for programs that show how a swarm does. They only read."""
