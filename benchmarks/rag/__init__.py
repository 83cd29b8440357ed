"""Retrievers that are trained, and answers from what a memory holds."""
