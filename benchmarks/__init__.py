"""Measurements side by side with the rivals, each in one command."""
