"""gRPC between peers: pinned channels, sessions, and chunked transfer of state."""
