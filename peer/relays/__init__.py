"""Relays over gRPC, for peers whose router lets nobody in."""
