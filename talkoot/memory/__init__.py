"""Memories: building, publishing and inspecting them."""
