"""What a language model gains from reading a memory, and what that costs."""
