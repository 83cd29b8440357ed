"""Text sources, tokenizers and the encoded corpus."""
