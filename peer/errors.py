"""All errors of Talkoot, in one tree.

TalkootError
├── UserError                   T100  an error that the user can fix; exit status 2
│   ├── SettingsError           T101  a setting, manifest or command line that is not valid
│   ├── InviteError             T102  a wrong or truncated invite
│   │   ├── RevokedInviteError  T116  an invite that the founder has revoked; exit status 3
│   │   └── ExpiredInviteError  T117  an invite that has expired; exit status 3
│   ├── StartError              T103  a peer could not start, or something could not be written
│   │   ├── PortError           T104  nobody can listen at that address and port
│   │   ├── StateFolderError    T105  a state folder that is in use or can't be written
│   │   └── DaemonError         T106  p2pd is missing, does not start or has died
│   ├── UnreachableError        T109  nobody answers at the addresses given
│   ├── SwarmError              T110  the swarm is not what was expected: no manifest, or another one or version
│   ├── DataError               T111  text that is missing, empty or unreadable
│   ├── InstallationError       T112  something that Talkoot needs is missing or broken
│   ├── CheckpointError         T113  a trainer's checkpoint that is missing, broken or of another swarm
│   ├── ModelError              T114  a model folder that is missing, broken or of another version
│   ├── LibraryError            T115  a memory that is missing or broken, or that may not be published
│   ├── UnavailableError        T118  nobody in the swarm now gives what is needed: experts, or the dense part
│   └── ControlError            T119  no node runs with the state folder, or it does not do what it was told
├── RecordError                 a DHT record that is malformed, unsigned, expired or another peer's
│   ├── RevokedError            a token that the founder has revoked
│   └── ExpiredTokenError       a token that has expired
├── AddressError                an endpoint or a multiaddress that is malformed, or of a kind that is not known
├── WireError                   a message that is malformed; INVALID_ARGUMENT at the edge
├── StateError                  saved tensors that are broken, or not those of this expert or model
│   └── OutOfReachError         another peer's copy is too far away from one's own to be averaged with
├── TransferError               an expert's state that could not be fetched from another node
│   └── VersionGoneError        parameters that have changed since the version that was asked for
└── ExpertError                 an expert did not do what was asked; has a gRPC status
"""

from __future__ import annotations  # the annotations of ExpertError name grpc without importing it

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import grpc


class TalkootError(Exception):
    """Base of all errors that Talkoot raises on purpose."""


class UserError(TalkootError):
    """An error that the user can fix. The message says how.

    `code` never changes: docs/troubleshooting.md says what each one means.
    """

    code: ClassVar[str] = "T100"
    exit_status: ClassVar[int] = 2


class SettingsError(UserError):
    """A setting, manifest or command line that is not valid."""

    code = "T101"


class InviteError(UserError):
    """A wrong or truncated invite."""

    code = "T102"


class RevokedInviteError(InviteError):
    """An invite that the swarm's founder has revoked. Service managers don't start the node again after its exit
    status.
    """

    code = "T116"
    exit_status = 3


class ExpiredInviteError(InviteError):
    """An invite that has expired. It has the same exit status, because starting again doesn't help either."""

    code = "T117"
    exit_status = 3


class StartError(UserError):
    """A peer could not start, or something could not be written."""

    code = "T103"


class PortError(StartError):
    """Nobody can listen at that address and port."""

    code = "T104"


class StateFolderError(StartError):
    """A state folder that is in use or can't be written."""

    code = "T105"

    def __init__(self, message: str, *, is_in_use: bool = False) -> None:
        super().__init__(message)
        self.is_in_use = is_in_use


class DaemonError(StartError):
    """p2pd is missing, does not start or has died."""

    code = "T106"


class UnreachableError(UserError):
    """Nobody answers at the addresses given."""

    code = "T109"


class SwarmError(UserError):
    """The swarm is not what was expected: no manifest, or another one or protocol version."""

    code = "T110"


class DataError(UserError):
    """Text that is missing, empty or unreadable."""

    code = "T111"


class InstallationError(UserError):
    """Something that Talkoot needs is missing or broken."""

    code = "T112"


class CheckpointError(UserError):
    """A trainer's checkpoint that is missing, broken or of another swarm."""

    code = "T113"


class ModelError(UserError):
    """A model folder that is missing, broken or of another version."""

    code = "T114"


class LibraryError(UserError):
    """A memory that is missing or broken, or that may not be published."""

    code = "T115"


class UnavailableError(UserError):
    """Nobody in the swarm now gives what is needed: experts, or the dense part of a model."""

    code = "T118"


class ControlError(UserError):
    """No node of this machine runs with the state folder, or it does not do what it was told."""

    code = "T119"


class RecordError(TalkootError):
    """A DHT record that is malformed, unsigned, expired or another peer's."""


class RevokedError(RecordError):
    """The swarm's founder has revoked the token that admitted the writer."""


class ExpiredTokenError(RecordError):
    """The token that admitted the writer has expired."""


class AddressError(TalkootError):
    """An endpoint or a multiaddress that is malformed, or of a kind that is not known."""


class WireError(TalkootError):
    """A message that is malformed; INVALID_ARGUMENT at the edge."""


class StateError(TalkootError):
    """Saved tensors that are broken, or not those of this expert or model."""


class OutOfReachError(StateError):
    """Another peer's copy is too far away from one's own to be averaged with."""

    def __init__(self, message: str, *, is_untrained: bool = False) -> None:
        """`is_untrained`: this peer's own copy was fetched, or is new, and has taken no update since, so it may not
        move at all.
        """
        super().__init__(message)
        self.is_untrained = is_untrained


class TransferError(TalkootError):
    """An expert's state could not be fetched from another node.

    `answered`: whether the node answered, for example with a refusal.
    """

    def __init__(self, message: str, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


class VersionGoneError(TransferError):
    """The replica no longer has the parameters of the requested version."""


class ExpertError(TalkootError):
    """An expert did not do what was asked.

    `status` is the gRPC status that the caller gets; `retry_after_s` is set for RESOURCE_EXHAUSTED.
    """

    def __init__(self, status: grpc.StatusCode, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
