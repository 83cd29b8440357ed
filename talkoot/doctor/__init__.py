"""Whether this machine can take part."""
