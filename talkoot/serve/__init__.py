"""A trained model for other programs, by OpenAI's HTTP interface, and a page to try it."""
