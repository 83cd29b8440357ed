"""What reading a memory gives a language model, and what it costs."""
