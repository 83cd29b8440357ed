"""One expert: its module, optimizer, state and device."""
