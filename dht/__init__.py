"""Who is alive, and which expert lives where."""
