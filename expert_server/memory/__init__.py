"""What a node hosts of memories: shards of passages, which retrievers search and read."""
