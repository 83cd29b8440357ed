"""Invites: the line that a volunteer pastes to join a swarm, and the founder's ledger of issued invites.

An invite holds bootstrap addresses, the swarm's name, the PeerID of its founder and, if the swarm needs one, a token.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import base58
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dht.admission import MAX_REVOKED, Grant, Role, no_longer_admitted, read_grant
from dht.records import SwarmKeys, parse_peer_id
from peer import clock
from peer.errors import (
    AddressError,
    ExpiredTokenError,
    InviteError,
    RecordError,
    SettingsError,
    StartError,
    UserError,
    WireError,
)
from peer.files import write_atomically
from peer.platform.files import open_plainly, wait_for_lock
from peer.transport.addresses import Multiaddress, known
from peer.wire import admission_pb2, records_pb2

FILE = "invites.json"
_LOCK_DEADLINE_S = 30.0
_SCHEME = "talkoot2"
"""The 2 is the version of the format. It changes whenever an old program could not read a new invite."""
_BEGINNING = re.compile(r"(?<![A-Za-z0-9])talkoot\d")
_WORD = re.compile(r"[^\W_]+")
"""A word of an invite. Chat and mail programs add other characters: quotes, asterisks, > before each line, zero-width
spaces.
"""
_MAX_CHARACTERS = 4096
_MOST_LINES = 256
"""The most lines over which a mail program may have wrapped an invite."""
_MAX_ADDRESSES = 16
_LONGEST_SHOWN = 200
_LONGEST_FILE = 8192
"""At most this many characters of a file are read."""


@dataclass(frozen=True)
class Invite:
    """What a peer needs to join a swarm and to recognise its manifest."""

    keys: SwarmKeys
    bootstrap: tuple[Multiaddress, ...]
    """Addresses, which are all tried at the same time."""
    token: bytes = field(default=b"", repr=False)
    """A serialized Token, which is a secret: in a swarm that admits by token, it admits its holder. May be empty."""

    @property
    def grant(self) -> Grant | None:
        """What the token says that it grants, not yet verified; None: there is no token, or it can't be read."""
        try:
            return read_grant(admission_pb2.Token.FromString(self.token).grant)
        except (DecodeError, RecordError):
            return None

    @property
    def role(self) -> Role | None:
        """The role that the token names; None as for `grant`."""
        return None if (grant := self.grant) is None else grant.role

    def check_expiry(self) -> None:
        """Raises ExpiredInviteError if there is a token that has expired."""
        try:
            if (grant := self.grant) is not None:
                grant.check_expiry(clock.now())
        except ExpiredTokenError as error:
            raise no_longer_admitted(error) from error

    def through(self, before: Iterable[Multiaddress] = (), after: Iterable[Multiaddress] = ()) -> "Invite":
        """The same invite with these addresses before and after its own; at most as many as others read."""
        bootstrap = dict.fromkeys((*before, *self.bootstrap, *after))
        return replace(self, bootstrap=tuple(islice(bootstrap, _MAX_ADDRESSES)))

    def __str__(self) -> str:
        message = records_pb2.InviteMessage(
            name=self.keys.name,
            author=self.keys.author.to_bytes(),
            bootstrap_addresses=self.bootstrap,
            token=admission_pb2.Token.FromString(self.token) if self.token else None,
        )
        checked: bytes = base58.b58encode_check(message.SerializeToString())
        return _SCHEME + checked.decode()

    @classmethod
    def read(cls, given: str) -> "Invite":
        """Reads an invite that was passed as the line itself, or as the file that contains it: `@FILE` or its path.

        Other users of a machine can see command lines, but not the contents of a file. Raises InviteError.
        """
        path = _file_of(given.strip())
        if path is None:
            return cls.parse(given)
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(_LONGEST_FILE)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InviteError(
                f"can't read the invite from {path}: {reason}; pass the file that contains the line"
            ) from error
        try:
            return cls.parse(text)
        except InviteError as error:
            raise InviteError(f"in {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "Invite":
        """Reads the line, which may be wrapped and have other words around it. Raises InviteError, which says what is
        wrong with it.
        """
        begins = _BEGINNING.search(text)
        if begins is None:
            raise InviteError(
                f"an invite starts with {_SCHEME!r}: copy the whole line that you were given, or pass @FILE with "
                "the file that contains it"
            )
        if begins[0] != _SCHEME:
            raise InviteError(
                "this invite is of another version of Talkoot: update it, or ask for a new invite"
            )
        message = records_pb2.InviteMessage()
        try:
            message.ParseFromString(_unwrapped(text[begins.end() :]))
            author = parse_peer_id(message.author)
        except (ValueError, DecodeError, WireError) as error:
            raise InviteError(
                "the invite is incomplete or mistyped (its checksum does not fit): copy the whole line again"
            ) from error
        addresses = known(Multiaddress, message.bootstrap_addresses, _MAX_ADDRESSES)
        if not addresses:
            raise InviteError("the invite names no usable bootstrap address: ask for a new one")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}[a-z0-9]", message.name):
            raise InviteError("the invite names no valid swarm: ask for a new one")
        token = message.token.SerializeToString() if message.HasField("token") else b""
        return cls(SwarmKeys(message.name, author), addresses, token)


def _unwrapped(text: str) -> bytes:
    """The Base58 text at the start of the words, up to where its checksum matches. Raises ValueError."""
    line = ""
    for word in islice(_WORD.finditer(text), _MOST_LINES):
        line += word[0]
        if len(line) > _MAX_CHARACTERS:
            raise InviteError(f"an invite has at most {_MAX_CHARACTERS} characters")
        with contextlib.suppress(ValueError):
            decoded: bytes = base58.b58decode_check(line)
            return decoded
    raise ValueError("the checksum does not fit")


def read_bootstrap(given: Iterable[str]) -> tuple[Multiaddress, ...]:
    """The addresses that were passed as --bootstrap: each a multiaddress, or an invite as `Invite.read` takes it, of
    which nothing else is used. Raises SettingsError and InviteError.
    """
    found: list[Multiaddress] = []
    for text in given:
        if text.startswith(("@", _SCHEME)):
            found += Invite.read(text).bootstrap
            continue
        try:
            found.append(Multiaddress(text))
        except AddressError as error:
            raise SettingsError(
                f"--bootstrap {text[:_LONGEST_SHOWN]}: neither an invite nor a multiaddress with a peer, such as "
                f"/ip4/10.0.0.1/tcp/31337/p2p/Qm…: {error}"
            ) from error
    return tuple(found)


def invite_of(join: str | None) -> Invite:
    """The invite that was passed as --join. Raises SettingsError if there was none, and InviteError."""
    if join is None:
        raise SettingsError(
            "pass --join INVITE, where INVITE is the line that you were given, or @FILE with the file that contains it"
        )
    return Invite.read(join)


class IssuedInvite(BaseModel):
    """One token that was issued. The token itself is not saved."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    serial: int = Field(gt=0, lt=2**32)
    role: Role
    name: str
    """The name that the founder gave to the invited person."""
    made_at: float
    expires_at: float
    revoked: bool = False

    @property
    def number(self) -> str:
        """The serial, as people read and type it."""
        return f"{self.serial:08x}"


class InviteLedger:
    """The founder's list of issued invites, in a file beside its key. The command and the running node share it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._stamp = self._stamp_now()

    def has_changed(self) -> bool:
        """Whether the file has been written since the last call."""
        before, self._stamp = self._stamp, self._stamp_now()
        return self._stamp != before

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def read(self) -> tuple[IssuedInvite, ...]:
        """All issued invites. Raises StartError if the file is broken."""
        try:
            return _File.model_validate_json(self._path.read_bytes()).issued
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StartError(
                f"can't read {self._path}, the list of your invites: {error.strerror}"
            ) from error
        except ValidationError as error:
            raise StartError(
                f"{self._path}, the list of your invites, is broken: restore it from a copy, or move it away"
            ) from error

    def add(self, issued: IssuedInvite) -> None:
        """Raises StartError."""
        with self._locked():
            self._write((*self.read(), issued))

    def revoke(self, which: str, now: float) -> IssuedInvite:
        """Marks an invite as revoked. `which`: its serial, or the name of its person if it is the only one for that
        name that is neither revoked nor expired. Raises UserError if there is no such invite, or if too many are
        revoked.
        """
        with self._locked():
            listed = self.read()
            found = self._found(which.strip(), listed, now)
            if len(revoked_in(listed, now)) >= MAX_REVOKED and not found.revoked:
                raise UserError(
                    f"{MAX_REVOKED} invites are revoked and have not expired: wait until some have"
                )
            changed = found.model_copy(update={"revoked": True})
            self._write(tuple(changed if each is found else each for each in listed))
            return changed

    def _found(self, which: str, listed: tuple[IssuedInvite, ...], now: float) -> IssuedInvite:
        """Raises UserError."""
        if with_number := [each for each in listed if each.number == which.lower()]:
            return with_number[0]
        named = [each for each in listed if each.name == which and not each.revoked and each.expires_at > now]
        if len(named) == 1:
            return named[0]
        if named:
            serials = ", ".join(each.number for each in named)
            raise UserError(f"{len(named)} invites for {which} are valid: pass the serial of one, {serials}")
        if over := [each for each in listed if each.name == which]:
            states = (
                f"{each.number} {'is already revoked' if each.revoked else 'has expired'}" for each in over
            )
            raise UserError(f"no invite for {which} is valid: {', '.join(states)}")
        raise UserError(
            f"no invite {which} in {self._path}: `talkoot invite --list --state "
            f"{shlex.quote(str(self._path.parent))}` shows those that you made"
        )

    def revoked(self, now: float) -> list[int]:
        """The serials to publish: revoked and not yet expired. Raises StartError."""
        return revoked_in(self.read(), now)

    def expired(self, now: float) -> list[int]:
        """The serials that have expired, so that nobody needs to know whether they are revoked. Raises StartError."""
        return [each.serial for each in self.read() if each.expires_at <= now]

    def _write(self, issued: tuple[IssuedInvite, ...]) -> None:
        try:
            write_atomically(self._path, _File(issued=issued).model_dump_json(indent=1).encode(), mode=0o600)
        except OSError as error:
            raise StartError(f"can't write {self._path}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps out other commands that run at the same time."""
        try:
            descriptor = open_plainly(self._path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT)
        except OSError as error:
            raise StartError(f"can't use the folder {self._path.parent}: {error.strerror}") from error
        try:
            wait_for_lock(descriptor, _LOCK_DEADLINE_S)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StartError(f"another command is changing {self._path}: try again") from error
        try:
            yield
        finally:
            os.close(descriptor)


def revoked_in(issued: tuple[IssuedInvite, ...], now: float) -> list[int]:
    """The serials that are revoked and not yet expired."""
    return [each.serial for each in issued if each.revoked and each.expires_at > now]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    issued: tuple[IssuedInvite, ...] = ()


def _file_of(given: str) -> Path | None:
    if given.startswith(_SCHEME):
        return None
    path = _expanded(given.removeprefix("@"))
    try:
        return path if given.startswith("@") or "/" in given or path.is_file() else None
    except (OSError, ValueError):  # no file can have such a name
        return None


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home folder of a user who does not exist
        return Path(path)
