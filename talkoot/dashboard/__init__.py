"""A read-only web page, and an interface for programs, that show the state of a swarm."""
