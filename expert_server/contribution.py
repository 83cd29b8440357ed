"""What a node has contributed, over all its runs: a small file in its state folder."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peer.files import write_whole

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 4096


class Contribution(BaseModel):
    """Rows computed, optimizer steps taken, and seconds served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(default=0, ge=0, lt=2**63)
    updates: int = Field(default=0, ge=0, lt=2**63)
    served_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Account:
    """Counts on from what the file says. One process at a time uses it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._before = _read(path)
        self._served_s = 0.0
        self._serves_since: float | None = None

    def note(self, *, serves: bool) -> None:
        """Whether the node serves from now on."""
        now = self._clock()
        if self._serves_since is not None:
            self._served_s += now - self._serves_since
        self._serves_since = now if serves else None

    def total(self, rows: int, updates: int) -> Contribution:
        """`rows` and `updates`: of this run."""
        before = self._before
        return Contribution(
            rows=before.rows + rows,
            updates=before.updates + updates,
            served_s=before.served_s + self._served_s,
        )

    async def save(self, total: Contribution) -> None:
        """Whole or not at all. A disk that is full is a warning."""
        try:
            await asyncio.to_thread(self._write, total)
        except OSError as error:
            logger.warning("could not write %s: %s", self._path, error)

    async def save_every(self, seconds: float, total: Callable[[], Contribution]) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.save(total())

    def _write(self, total: Contribution) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self._path, total.model_dump_json().encode())


def _read(path: Path) -> Contribution:
    """What is not there, or not as it was written, counts as nothing."""
    try:
        with path.open("rb") as file:
            return Contribution.model_validate_json(file.read(_MAX_FILE_BYTES))
    except FileNotFoundError:
        return Contribution()
    except (OSError, ValidationError) as error:
        logger.warning(
            "%s can't be read, the contribution is counted anew: %s", path, str(error).split("\n")[0]
        )
        return Contribution()
