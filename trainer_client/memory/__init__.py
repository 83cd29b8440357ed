"""Looks passages up in memories: the encoder, the codebook, and the retriever."""
