"""Who may take part in a swarm: the founder's tokens, the badges that peers make from them, and each peer's denylist.

A token has its own key, and the founder's signed grant names that key. A peer signs its PeerID with the key; grant and
signature together are its badge. So anybody who holds a token can join with it, but nobody can use another peer's
badge.
"""

import logging
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Literal

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError
from grpc import StatusCode

from dht.records import SwarmKeys
from peer import clock
from peer.bounded import BoundedDict
from peer.errors import (
    ExpertError,
    ExpiredInviteError,
    ExpiredTokenError,
    InviteError,
    RecordError,
    RevokedError,
    RevokedInviteError,
    SettingsError,
)
from peer.formatting import age_in_words
from peer.identity import GRANT_DOMAIN, Identity, PeerID, is_peer_id, verify
from peer.rpc.sessions import OPEN_TO_ALL, Admitted, Right
from peer.wire import admission_pb2, records_pb2, session_pb2

logger: logging.Logger = logging.getLogger(__name__)

Mode = Literal["open", "token"]
MAX_DENIED = 65_536
MAX_REVOKED = 1024
MAX_GRANT_BYTES = 512
MAX_BADGE_BYTES = 672
"""The limit for a badge: a grant, and two signatures of 64 bytes. A usual one has 200 bytes."""
_LONGEST_FILE = 8 * 2**20
"""At most this many bytes of the denylist are read."""
BADGE_DOMAIN = b"talkoot badge v1\0"
_REMEMBERED_BADGES = 4096
_REMEMBERED_OUT = 256
_WARN_BEFORE_S = 5 * 86400.0
"""How long before its token expires a peer's owner is warned, once a day."""
_WARN_EVERY_S = 86400.0


class Role(Enum):
    """In what role a peer takes part."""

    NODE = admission_pb2.ROLE_NODE
    TRAINER = admission_pb2.ROLE_TRAINER
    READER = admission_pb2.ROLE_READER
    LIBRARIAN = admission_pb2.ROLE_LIBRARIAN

    @property
    def word(self) -> str:
        return self.name.lower()


RIGHTS: Mapping[Role, frozenset[Right]] = {
    Role.NODE: frozenset({session_pb2.RIGHT_FETCH}),
    Role.TRAINER: frozenset(
        {session_pb2.RIGHT_FORWARD, session_pb2.RIGHT_BACKWARD, session_pb2.RIGHT_AVERAGE}
    ),
    Role.READER: frozenset({session_pb2.RIGHT_FORWARD}),
    Role.LIBRARIAN: frozenset(),
}
OPEN_TO_MEMBERS = OPEN_TO_ALL | {session_pb2.RIGHT_RELAY, session_pb2.RIGHT_MEMORY}
"""The rights that any token gives."""
EXPORT = session_pb2.RIGHT_EXPORT
"""The right to export, which the roles named in the manifest have in addition to `RIGHTS`."""
_RECORDS: Mapping[str, frozenset[Role]] = {
    "announcement": frozenset({Role.NODE}),
    "hosting": frozenset({Role.NODE}),
    "node": frozenset({Role.NODE, Role.LIBRARIAN}),
    "region": frozenset({Role.NODE, Role.LIBRARIAN}),
    "library": frozenset({Role.LIBRARIAN}),
    "trainer": frozenset({Role.TRAINER, Role.READER}),
}
"""Which roles may write which kind of record."""


@dataclass(frozen=True)
class Grant:
    """What the founder has granted, after all checks."""

    swarm_id: str
    role: Role
    expires_at: float
    serial: int
    key: bytes

    def check_expiry(self, now: float) -> None:
        """Raises ExpiredTokenError."""
        if self.expires_at <= now:
            raise ExpiredTokenError("the token has expired")


class Denylist:
    """The peers that this one neither calls nor answers: those named in its settings, and those in a file.

    The file has one PeerID per line; text after a `#` is a comment. The owner can edit it at any time.
    """

    def __init__(self, path: Path | None = None, denied: Collection[str] = ()) -> None:
        """`path`: the file, which need not exist yet. Raises SettingsError if one of `denied` is not a PeerID."""
        self._path = path
        try:
            self._always = frozenset(map(parse_denied, denied))
        except SettingsError as error:
            raise SettingsError(f"deny: {error}") from None
        self._from_file: frozenset[PeerID] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self.reread()

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._always or peer_id in self._from_file

    def __len__(self) -> int:
        return len(self._always | self._from_file)

    def reread(self) -> None:
        """Reads the file if it has changed. If it can't be read, the list stays as it is."""
        if self._path is None:
            return
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size
            if stamp == self._stamp:
                return
            with self._path.open(encoding="utf-8-sig", errors="replace") as file:
                lines = file.read(_LONGEST_FILE).splitlines()
        except FileNotFoundError:
            self._from_file, self._stamp = frozenset(), None
            return
        except OSError as error:
            logger.warning("can't read the denylist %s: %s", self._path, error.strerror)
            return
        self._stamp = stamp
        self._from_file = frozenset(self._parsed(lines))

    def _parsed(self, lines: Iterable[str]) -> Iterable[PeerID]:
        count = 0
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            count += 1
            if count > MAX_DENIED:
                logger.warning("%s: only the first %d peers are denied", self._path, MAX_DENIED)
                return
            try:
                yield parse_denied(text)
            except SettingsError as error:
                logger.warning("%s, line %d: %s", self._path, number, error)


class SwarmAdmission:
    """The rules of one swarm, as this peer applies them to callers and to records. Holds no secrets."""

    def __init__(
        self, keys: SwarmKeys, denylist: Denylist | None = None, now: Callable[[], float] = clock.now
    ) -> None:
        self.denylist: Denylist = denylist or Denylist()
        self._keys = keys
        self._now = now
        self._mode: Mode | None = None
        self._exporters: frozenset[Role] = frozenset()
        self._founder_key = b""
        self.badge: admission_pb2.Badge | None = None
        """The badge that admits this peer, if it needs one."""
        self._holder: PeerID | None = None
        self._warned_at = -math.inf
        self.revoked: frozenset[int] = frozenset()
        """The serials of revoked tokens, as far as this peer knows."""
        self._out: BoundedDict[PeerID, str] = BoundedDict(_REMEMBERED_OUT)
        """Why the swarm no longer admits some peers whose calls or records came since."""

    def learn(self, founder_key: bytes, mode: Mode, exporters: Iterable[Role] = ()) -> None:
        """Applies the manifest's rules from now on. Before that, callers may use only the DHT, and all records are
        accepted.

        `founder_key`: the public key in the manifest's record. `exporters`: roles that may export the model.
        """
        self._founder_key, self._mode, self._exporters = founder_key, mode, frozenset(exporters)

    def present(self, token: admission_pb2.Token, holder: PeerID) -> Grant:
        """Makes this peer's own badge from its token. Raises RecordError, which says why the token can't be used."""
        badge = make_badge(token, holder)
        grant = self._granted(badge, holder)
        self.badge, self._holder = badge, holder
        return grant

    def check_own(self) -> None:
        """Raises RecordError if this peer has a badge that others no longer accept."""
        self._own_grant()

    @property
    def expires_in_s(self) -> float | None:
        """Seconds until this peer's token expires; None if it has none."""
        return None if self.badge is None else read_grant(self.badge.grant).expires_at - self._now()

    def warn_of_expiry(self) -> None:
        """Warns the owner, once a day, if this peer's token expires in the next days."""
        try:
            grant = self._own_grant()
        except RecordError:
            return
        now = self._now()
        if grant is None or grant.expires_at > now + _WARN_BEFORE_S or now < self._warned_at + _WARN_EVERY_S:
            return
        self._warned_at = now
        logger.warning(
            "your invite expires in %s: ask the swarm's founder for a new one, and start again with it. What is saved "
            "here stays",
            age_in_words(grant.expires_at - now),
        )

    def _own_grant(self) -> Grant | None:
        """None if this peer needs no badge. Raises RecordError."""
        return None if self.badge is None or self._holder is None else self._granted(self.badge, self._holder)

    @property
    def mode(self) -> Mode:
        assert self._mode is not None, "the manifest is read first"
        return self._mode

    def revoke(self, serials: Collection[int]) -> None:
        """Adds the founder's current list. A revoked token stays revoked: an older list can't restore it."""
        now = frozenset(list(serials)[:MAX_REVOKED])
        self.revoked |= now
        if len(self.revoked) > 2 * MAX_REVOKED:
            self.revoked = now

    def _hear(self, serials: Collection[int]) -> None:
        """Adds a list that others store here, which may be an older one, so that this peer need not look for it."""
        heard = self.revoked.union(serials)
        if len(heard) <= 2 * MAX_REVOKED:
            self.revoked = heard

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        """Admits a caller with these rights. Raises ExpertError (PERMISSION_DENIED), which says what is missing."""
        if caller in self.denylist:
            raise ExpertError(StatusCode.PERMISSION_DENIED, "this node's owner has denied you")
        if rights <= OPEN_TO_ALL:
            return Admitted()
        if self._mode is None:
            raise ExpertError(StatusCode.UNAVAILABLE, "this peer is starting: try again in some seconds", 1.0)
        if self.mode == "open" or caller == self._keys.author:
            return Admitted()
        try:
            grant = self._granted(badge, caller)
        except RecordError as error:
            raise ExpertError(
                StatusCode.PERMISSION_DENIED, f"this swarm admits by token, and {error}"
            ) from error
        more = {EXPORT} if grant.role in self._exporters else set()
        if missing := rights - RIGHTS[grant.role] - OPEN_TO_MEMBERS - more:
            names = ", ".join(sorted(map(_name_of, missing)))
            raise ExpertError(
                StatusCode.PERMISSION_DENIED, f"a {grant.role.word}'s token does not give {names}"
            )
        return Admitted(grant.serial, grant.expires_at)

    def signer_of(self, trainer: PeerID, badge: admission_pb2.Badge | None) -> int | None:
        """The serial of the token that lets a trainer sign receipts, or 0 for the founder itself.

        None in an open swarm, where any trainer may sign. A token that has expired still counts, because the work was
        done before. Raises RecordError if the trainer may not sign.
        """
        if self.mode == "open":
            return None
        if trainer == self._keys.author:
            return 0
        if badge is None:
            raise RecordError("the badge is missing")
        grant = check_badge(badge, trainer, self._keys.swarm_id, self._founder_key)
        if session_pb2.RIGHT_FORWARD not in RIGHTS[grant.role]:
            raise RecordError(f"a {grant.role.word}'s token does not allow receipts")
        if grant.serial in self.revoked:
            raise RecordError("the token was revoked")
        return grant.serial

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        """Whether a caller that was admitted by this grant is still admitted."""
        return caller not in self.denylist and serial not in self.revoked

    def check_record(self, payload: records_pb2.RecordPayload, writer: PeerID) -> None:
        """Raises RecordError if this writer may not write this record in this swarm. Its signature is already checked.
        Applies the founder's list of revoked tokens.
        """
        body = payload.WhichOneof("body") or ""
        if not payload.key.startswith(f"{self._keys.swarm_id}."):
            return
        # a stranger's library, which would live for weeks, is not accepted before the rules are known either
        if self._mode is None and body != "library":
            return
        if writer in self.denylist:
            raise RecordError("the record's writer is denied here")
        if writer == self._keys.author:
            if body == "revocations":
                self._hear(payload.revocations.serials)
            return
        # this peer's earlier record, whose token may be over, says how long others hold it; a library counts as long as
        # its token does
        if writer == self._holder and body != "library":
            return
        if self._mode != "token":
            if body == "library":
                raise RecordError("only the founder of an open swarm publishes memories")
            return
        grant = self._granted(payload.badge if payload.HasField("badge") else None, writer)
        if grant.role not in _RECORDS.get(body, frozenset()):
            raise RecordError(f"a {grant.role.word}'s token does not allow a record of kind {body!r}")

    def _granted(self, badge: admission_pb2.Badge | None, peer_id: PeerID) -> Grant:
        if badge is None:
            raise RecordError("there is none")
        grant = check_badge(badge, peer_id, self._keys.swarm_id, self._founder_key)
        try:
            grant.check_expiry(self._now())
            if grant.serial in self.revoked:
                raise RevokedError("the token was revoked")
        except RecordError as error:
            self._out[peer_id] = "was revoked" if isinstance(error, RevokedError) else "has expired"
            raise
        self._out.pop(peer_id, None)
        return grant

    def why_out(self, peer_id: PeerID) -> str:
        """What became of the invite of a peer that the swarm no longer admits, such as `was revoked`. Empty if it does,
        or if this peer has seen no call or record of it since.
        """
        return self._out.get(peer_id, "")


def invite_error(error: RecordError, message: str) -> InviteError:
    """The error for a user whose token is no longer accepted because of `error`."""
    if isinstance(error, RevokedError):
        return RevokedInviteError(message)
    return ExpiredInviteError(message) if isinstance(error, ExpiredTokenError) else InviteError(message)


def no_longer_admitted(error: RecordError) -> InviteError:
    """The error for a user whose invite has a token that can't be used because of `error`."""
    return invite_error(
        error, f"this invite no longer admits you: {error}; ask the founder for another{clock.CLOCK.doubt}"
    )


def parse_denied(text: str) -> PeerID:
    """Raises SettingsError."""
    try:
        data = base58.b58decode(text)
    except ValueError:
        data = b""
    if not is_peer_id(data):
        raise SettingsError(
            f"{text[:80]!r} is not a PeerID: `talkoot status --json` shows those of a swarm's peers"
        )
    return PeerID(data)


def make_token(
    founder: Identity, swarm_id: str, role: Role, expires_at: float, serial: int
) -> admission_pb2.Token:
    """Makes a token with a new key."""
    key = Ed25519PrivateKey.generate()
    grant = admission_pb2.Grant(
        swarm_id=swarm_id,
        role=role.value,
        expires_at=expires_at,
        serial=serial,
        key=key.public_key().public_bytes_raw(),
    ).SerializeToString()
    return admission_pb2.Token(
        grant=grant, signature=founder.sign(grant, GRANT_DOMAIN), secret=key.private_bytes_raw()
    )


def new_serial() -> int:
    return secrets.randbelow(2**32 - 1) + 1


def make_badge(token: admission_pb2.Token, peer_id: PeerID) -> admission_pb2.Badge:
    """This peer's badge from its token. Raises RecordError if the token has no key."""
    try:
        key = Ed25519PrivateKey.from_private_bytes(token.secret)
    except ValueError:
        raise RecordError("the token has no key") from None
    return admission_pb2.Badge(
        grant=token.grant,
        signature=token.signature,
        holder_signature=key.sign(BADGE_DOMAIN + peer_id.to_bytes()),
    )


def read_grant(data: bytes) -> Grant:
    """Parses a grant. Raises RecordError. The founder's signature is checked only by `check_badge`."""
    if len(data) > MAX_GRANT_BYTES:
        raise RecordError(f"the grant has {len(data)} bytes, more than {MAX_GRANT_BYTES}")
    grant = admission_pb2.Grant()
    try:
        grant.ParseFromString(data)
        role = Role(grant.role)
    except (DecodeError, ValueError) as error:
        raise RecordError("the grant can't be parsed") from error
    if not grant.serial or len(grant.key) != 32 or not math.isfinite(grant.expires_at):
        raise RecordError("the grant lacks a serial, a key or an expiry")
    return Grant(grant.swarm_id, role, grant.expires_at, grant.serial, grant.key)


def check_badge(badge: admission_pb2.Badge, peer_id: PeerID, swarm_id: str, founder_key: bytes) -> Grant:
    """The founder's grant to this peer. Raises RecordError. Checks neither expiry nor revocation."""
    if badge.ByteSize() > MAX_BADGE_BYTES:  # it may have unknown fields, and is remembered with them
        raise RecordError(f"the badge has {badge.ByteSize()} bytes, more than {MAX_BADGE_BYTES}")
    grant = _checked(badge.SerializeToString(deterministic=True), peer_id.to_bytes(), founder_key)
    if grant.swarm_id != swarm_id:
        raise RecordError(f"the badge is for swarm {grant.swarm_id[:64]!r}")
    return grant


@lru_cache(maxsize=_REMEMBERED_BADGES)
def _checked(data: bytes, peer_id: bytes, founder_key: bytes) -> Grant:
    """Cached, because every record of a peer carries the same badge."""
    badge = admission_pb2.Badge.FromString(data)
    grant = read_grant(badge.grant)
    verify(founder_key, badge.grant, badge.signature, GRANT_DOMAIN)
    try:
        holder = Ed25519PublicKey.from_public_bytes(grant.key)
        holder.verify(badge.holder_signature, BADGE_DOMAIN + peer_id)
    except (InvalidSignature, ValueError):
        raise RecordError("the badge is another peer's") from None
    return grant


def _name_of(right: Right) -> str:
    try:
        return session_pb2.Right.Name(right).removeprefix("RIGHT_").lower()
    except ValueError:
        return f"right {right}"
