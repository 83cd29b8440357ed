"""Relays over gRPC, for peers whose router accepts no incoming connections."""
