"""The invite: the one line a volunteer pastes. Bootstrap addresses, the swarm's name, its author's key fingerprint."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import base58
from google.protobuf.message import DecodeError

from dht.records import SwarmKeys, parse_peer_id
from peer.errors import InviteError, WireError
from peer.transport.addresses import is_multiaddress
from peer.wire import admission_pb2, records_pb2

_SCHEME = "talkoot1"
"""The 1 is the form of the invite; it changes when an old program could not read a new invite."""
_MAX_CHARACTERS = 4096
_MAX_ADDRESSES = 16
_LONGEST_FILE = 8192
"""Characters read from a file, of which the first word that looks so is the invite; `parse` says what is too long."""


@dataclass(frozen=True)
class Invite:
    """What one needs to know to join a swarm and to recognise its manifest."""

    keys: SwarmKeys
    bootstrap: tuple[str, ...]
    """Multiaddresses, tried all at once."""
    token: bytes = field(default=b"", repr=False)
    """What lets its holder into a swarm that admits by token: a serialized Token, a secret. Empty: none."""

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
        """What somebody passed as invite: the line itself, or the file that holds it, as `@FILE` or its path.

        Other users of the machine see what stands on a command line, but not what is in a file. Raises InviteError.
        """
        path = _file_of(given.strip())
        if path is None:
            return cls.parse(given)
        try:
            with path.open(encoding="utf-8") as file:
                words = file.read(_LONGEST_FILE).split()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InviteError(
                f"can't read the invite from {path}: {reason}; pass the file that holds the line"
            ) from error
        try:
            return cls.parse(next((word for word in words if word.startswith(_SCHEME)), "".join(words[:1])))
        except InviteError as error:
            raise InviteError(f"in {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "Invite":
        """Raises InviteError that says what is wrong with the line."""
        text = text.strip()
        if not text.startswith("talkoot"):
            raise InviteError(
                f"an invite starts with {_SCHEME!r}: copy the whole line that you were given, or pass @FILE with "
                "the file that holds it"
            )
        if not text.startswith(_SCHEME):
            raise InviteError(
                "this invite is of another version of Talkoot: update it, or ask for a new invite"
            )
        if len(text) > _MAX_CHARACTERS:
            raise InviteError(f"an invite has at most {_MAX_CHARACTERS} characters")
        message = records_pb2.InviteMessage()
        try:
            message.ParseFromString(base58.b58decode_check(text.removeprefix(_SCHEME)))
            author = parse_peer_id(message.author)
        except (ValueError, DecodeError, WireError) as error:
            raise InviteError(
                "the invite is incomplete or mistyped (its checksum does not fit): copy the whole line again"
            ) from error
        addresses = tuple(message.bootstrap_addresses)
        if not addresses or len(addresses) > _MAX_ADDRESSES or not all(map(is_multiaddress, addresses)):
            raise InviteError("the invite names no usable bootstrap address: ask for a new one")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}[a-z0-9]", message.name):
            raise InviteError("the invite names no valid swarm: ask for a new one")
        token = message.token.SerializeToString() if message.HasField("token") else b""
        return cls(SwarmKeys(message.name, author), addresses, token)


def _file_of(given: str) -> Path | None:
    if given.startswith(_SCHEME):
        return None
    path = _expanded(given.removeprefix("@"))
    try:
        return path if given.startswith("@") or "/" in given or path.is_file() else None
    except (OSError, ValueError):  # nobody's file has such a name
        return None


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of a user who does not exist
        return Path(path)
