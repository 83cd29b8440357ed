"""What a check of the machine found: printed as a table or JSON, and kept in the state folder."""

import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from peer.errors import DataError, StartError
from peer.files import write_whole
from talkoot.terminal import Terminal, age_in_words

REPORT_FILE = "check.json"
_REPORT_VERSION = 1
_MAX_BYTES = 100_000


class Verdict(StrEnum):
    """How well one thing is fit for a node."""

    OK = "ok"
    WEAK = "weak"
    """It can serve, but not well."""
    PROBLEM = "problem"
    """It can't serve."""
    SKIPPED = "not checked"


class Finding(BaseModel):
    """What was found about one thing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    verdict: Verdict
    says: str
    fix: str = ""
    """What to do, when it is not fit."""
    values: Mapping[str, bool | int | float | str] = {}
    """The figures, with their units in their names."""


class Report(BaseModel):
    """All findings of one check."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = _REPORT_VERSION
    checked_at: float
    """Unix time in seconds."""
    swarm: str | None
    """Its id; None when no invite was given."""
    findings: tuple[Finding, ...]

    @property
    def can_serve(self) -> bool:
        return not any(finding.verdict is Verdict.PROBLEM for finding in self.findings)

    def save(self, state: Path) -> None:
        """Raises StartError."""
        path = state / REPORT_FILE
        try:
            write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())
        except OSError as error:
            raise StartError(f"can't write {path}: {error.strerror}; pass another --state") from error

    @classmethod
    def load(cls, state: Path) -> "Report":
        """Raises DataError when there is none that this version can read."""
        path = state / REPORT_FILE
        again = "run `talkoot doctor` without --cached"
        try:
            with path.open("rb") as file:
                report = cls.model_validate_json(file.read(_MAX_BYTES))
        except FileNotFoundError:
            raise DataError(f"this machine was not checked yet with {state}: {again}") from None
        except (OSError, ValidationError) as error:
            raise DataError(f"can't read {path}: {again}") from error
        if report.version != _REPORT_VERSION:
            raise DataError(f"{path} is of another version: {again}")
        return report

    def to_dict(self, now: float) -> dict[str, Any]:
        """The form of `talkoot node --check --json`. Ages in seconds."""
        return {
            "can_serve": self.can_serve,
            "checked_at": self.checked_at,
            "age_s": now - self.checked_at,
            "swarm": self.swarm,
            "checks": [finding.model_dump(mode="json") for finding in self.findings],
        }


def show(terminal: Terminal, report: Report, *, cached: bool) -> None:
    """Prints the findings, and how old they are when they are not new."""
    now = time.time()
    if terminal.json:
        terminal.event("check", report.to_dict(now))
        return
    if cached:
        terminal.line(f"checked {age_in_words(now - report.checked_at)} ago")
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in report.findings:
        table.add_row(finding.verdict.value, finding.name, finding.says)
        if finding.fix and finding.verdict is not Verdict.OK:
            table.add_row("", "", f"→ {finding.fix}")
    terminal.out.print(table)
    if report.can_serve:
        terminal.line("this machine can host experts")
    else:
        terminal.line("this machine can't host experts: something above prevents it")
