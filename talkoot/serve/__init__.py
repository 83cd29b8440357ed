"""Serves a trained model to other programs, through OpenAI's HTTP interface, with a page to try it."""
