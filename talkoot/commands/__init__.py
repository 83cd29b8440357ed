"""What each command takes. What is slow to import is imported inside the commands, so that --help is instant."""
