"""What a node did in a week, written to the log for its owner. A week continues over restarts."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expert_server.status import NodeStatus
from peer.files import write_atomically
from peer.formatting import counted
from talkoot.node.view import hours_in_words, signed_in_words

logger: logging.Logger = logging.getLogger(__name__)

WEEK_S = 7 * 86400.0
_LOOK_EVERY_S = 600.0
_MAX_FILE_BYTES = 4096


class WeekBegun(BaseModel):
    """The start of a week, and what the node had done over all runs until then."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    began_at: float = Field(ge=0, allow_inf_nan=False)
    hours: float = Field(ge=0, allow_inf_nan=False)
    rows: int = Field(ge=0)
    signed_rows: int = Field(ge=0)

    @classmethod
    def at(cls, status: NodeStatus, now: float) -> "WeekBegun":
        return cls(
            began_at=now,
            hours=status.contributed_hours,
            rows=status.contributed_rows,
            signed_rows=status.signed.work.pairs,
        )

    def summary(self, status: NodeStatus) -> str:
        """What the node has done since then."""
        hours = hours_in_words(max(0.0, status.contributed_hours - self.hours))
        rows = counted(max(0, status.contributed_rows - self.rows), "row", ",")
        signed = counted(max(0, status.signed.work.pairs - self.signed_rows), "row", ",")
        return (
            f"in the last week: {hours} served, computed {rows}, trainers signed for {signed}; "
            f"in all runs {signed_in_words(status)}"
        )


class WeeklySummary:
    """Reports once a week what a node has done. The week is saved in a small file."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._begun: WeekBegun | None = None

    async def keep_telling(self, status: Callable[[], NodeStatus]) -> None:
        """Logs each week's summary until cancelled."""
        while True:
            said = await asyncio.to_thread(self.look, status())
            if said:
                logger.info("%s", said)
            await asyncio.sleep(_LOOK_EVERY_S)

    def look(self, status: NodeStatus) -> str:
        """The summary if a week is over; then the next one begins. Otherwise empty."""
        now = self._now()
        begun = self._begun = self._begun or self._read()
        # a clock that was set back, or far ahead and back again, must not stop the weeks
        is_over = begun is not None and now - begun.began_at >= WEEK_S
        if begun is not None and not is_over and begun.began_at <= now:
            return ""
        self._begun = WeekBegun.at(status, now)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path, self._begun.model_dump_json().encode())
        except OSError as error:
            logger.warning("could not write %s: %s", self._path, error)
        return begun.summary(status) if begun is not None and is_over else ""

    def _read(self) -> WeekBegun | None:
        """None if the file is missing or broken: then a week begins."""
        try:
            with self._path.open("rb") as file:
                return WeekBegun.model_validate_json(file.read(_MAX_FILE_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning(
                "%s can't be read, so a new week begins: %s", self._path, str(error).split("\n")[0]
            )
            return None
