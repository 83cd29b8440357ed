"""The DHT: hivemind's node with bounds and validation, and our own look-ups."""
