"""Answers from what a memory holds."""
