"""What a node hosts of memories: shards of passages, searched and read by retrievers."""
