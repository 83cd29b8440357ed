"""How well a memory finds passages, how fast its hosts answer, and how it copes with hosts that die or lie."""
