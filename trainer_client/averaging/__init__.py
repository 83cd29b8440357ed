"""Trainers average their dense parts in pairs."""
