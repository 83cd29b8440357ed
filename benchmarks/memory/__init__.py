"""How well a memory finds passages, how fast its hosts answer, and what it makes of hosts that die or lie."""
