"""The rounds that a running node makes again and again, and what the DHT did not do in them."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from peer.errors import UnreachableError

logger = logging.getLogger(__name__)

Step: TypeAlias = Callable[[], Awaitable[None]]


class Rounds:
    """Runs steps by the name of their round, and remembers which rounds failed the last time."""

    def __init__(self, again_s: float) -> None:
        """`again_s`: until the next round, in seconds, for the log."""
        self.failures = 0
        """Rounds that failed, since the start."""
        self._again_s = again_s
        self._failing: set[str] = set()

    @property
    def are_failing(self) -> bool:
        """Whether one of them failed the last time."""
        return bool(self._failing)

    async def run(self, name: str, *steps: Step) -> None:
        """Runs all steps, also when the DHT does not answer in one of them."""
        failures = [error for step in steps if (error := await tried(step))]
        if failures:
            self.failures += 1
            self._failing.add(name)
            logger.warning("%s; trying again in %.0f s", failures[0], self._again_s)
        else:
            self._failing.discard(name)


async def tried(step: Step) -> UnreachableError | None:
    """Runs it; gives back what the DHT did not do."""
    try:
        await step()
    except UnreachableError as error:
        return error
    return None
