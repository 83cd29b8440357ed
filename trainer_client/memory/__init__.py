"""Looks up passages in memories: the encoder, the codebook, and the retriever."""
