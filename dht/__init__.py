"""Which peers are alive, and where each expert is hosted."""
