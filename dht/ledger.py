"""The founder's list of the tokens it has made, in a file beside its key."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dht.admission import MAX_REVOKED, Role
from peer.errors import StartError, UserError
from peer.files import write_whole

FILE = "invites.json"


class Issued(BaseModel):
    """One token that was made. The token itself is not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    serial: int = Field(gt=0, lt=2**32)
    role: Role
    name: str
    """Whom it is for, in the founder's words."""
    made_at: float
    expires_at: float
    revoked: bool = False

    @property
    def number(self) -> str:
        """The serial as people read and type it."""
        return f"{self.serial:08x}"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    issued: tuple[Issued, ...] = ()


class Ledger:
    """Read and written by the command and by the founder's running node, which need not know of each other."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def read(self) -> tuple[Issued, ...]:
        """None made yet: empty. Raises StartError when the file is broken."""
        try:
            return _File.model_validate_json(self._path.read_bytes()).issued
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            raise StartError(
                f"can't read {self._path}, the list of your invites: restore it from a copy, or move it away"
            ) from error

    def add(self, issued: Issued) -> None:
        """Raises StartError."""
        with self._locked():
            self._write((*self.read(), issued))

    def revoke(self, number: str, now: float) -> Issued:
        """Raises UserError when there is none, or when too many are revoked."""
        with self._locked():
            listed = self.read()
            found = next((each for each in listed if each.number == number.strip().lower()), None)
            if found is None:
                raise UserError(f"no invite {number}: `talkoot invite --list` shows those that you made")
            if len(revoked_in(listed, now)) >= MAX_REVOKED and not found.revoked:
                raise UserError(
                    f"{MAX_REVOKED} invites are revoked and have not expired: wait until some have"
                )
            changed = found.model_copy(update={"revoked": True})
            self._write(tuple(changed if each is found else each for each in listed))
            return changed

    def revoked(self, now: float) -> list[int]:
        """The serials to publish: what has expired need not be revoked. Raises StartError."""
        return revoked_in(self.read(), now)

    def _write(self, issued: tuple[Issued, ...]) -> None:
        try:
            write_whole(self._path, _File(issued=issued).model_dump_json(indent=1).encode(), mode=0o600)
        except OSError as error:
            raise StartError(f"can't write {self._path}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against another command at the same time."""
        try:
            descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StartError(f"can't use the folder {self._path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def revoked_in(issued: tuple[Issued, ...], now: float) -> list[int]:
    return [each.serial for each in issued if each.revoked and each.expires_at > now]
