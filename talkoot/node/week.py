"""What a node did in a week, written to the log for its owner. A week continues over restarts."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from expert_server.status import NodeStatus
from peer.files import read_state_file, write_state_file
from peer.formatting import counted
from talkoot.node.view import hours_in_words, signed_in_words, so_far

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
            f"in all runs {so_far(status)}; {signed_in_words(status)}"
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
        parse, lost = WeekBegun.model_validate_json, "a new week begins"
        begun = self._begun = self._begun or read_state_file(self._path, _MAX_FILE_BYTES, parse, lost)
        # a clock that was set back, or far ahead and back again, must not stop the weeks
        is_over = begun is not None and now - begun.began_at >= WEEK_S
        if begun is not None and not is_over and begun.began_at <= now:
            return ""
        self._begun = WeekBegun.at(status, now)
        write_state_file(
            self._path, self._begun.model_dump_json().encode(), "after a restart, a new week begins"
        )
        return begun.summary(status) if begun is not None and is_over else ""
