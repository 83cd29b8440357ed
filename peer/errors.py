"""All errors of Talkoot, in one tree.

TalkootError
├── UserError                   what the person at the keyboard can mend; exit status 2
│   ├── SettingsError           a setting, manifest or command line that is not valid
│   ├── InviteError             a wrong or truncated invite
│   ├── StartError              a peer could not start: port taken, state folder in use, p2pd missing
│   ├── UnreachableError        nobody answers at the addresses given
│   ├── SwarmError              the swarm is not what was expected: no manifest, other version, name taken
│   ├── DataError               text that is missing, empty or unreadable
│   └── CheckpointError         a trainer's checkpoint that is missing, broken or of another swarm
├── RecordError                 a DHT record that is malformed, unsigned, expired or not its writer's
├── WireError                   a message that is malformed; INVALID_ARGUMENT at the edge
├── StateError                  saved tensors that are broken, or not those of this expert or model
├── TransferError               an expert's state that did not come from another node
└── ExpertError                 an expert did not do what was asked; has a gRPC status
"""

from __future__ import annotations  # ExpertError's annotations name grpc lazily

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


class TalkootError(Exception):
    """Base of all errors that Talkoot raises on purpose."""


class UserError(TalkootError):
    """What the person at the keyboard can mend: the message says how. Exit status 2."""


class SettingsError(UserError):
    """A setting, manifest or command line that is not valid."""


class InviteError(UserError):
    """A wrong or truncated invite."""


class StartError(UserError):
    """A peer could not start: port taken, state folder in use, p2pd missing."""


class UnreachableError(UserError):
    """Nobody answers at the addresses given."""


class SwarmError(UserError):
    """The swarm is not what was expected: no manifest, another protocol version, name taken."""


class DataError(UserError):
    """Text that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A trainer's checkpoint that is missing, broken or of another swarm."""


class RecordError(TalkootError):
    """A DHT record that is malformed, unsigned, expired or not its writer's."""


class WireError(TalkootError):
    """A message that is malformed; INVALID_ARGUMENT at the edge."""


class StateError(TalkootError):
    """Saved tensors that are broken, or not those of this expert or model."""


class TransferError(TalkootError):
    """An expert's state that did not come from another node.

    `answered` tells a node that said no from one that is not there.
    """

    def __init__(self, message: str, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


class ExpertError(TalkootError):
    """An expert did not do what was asked.

    `status` is the gRPC status that the caller sees; `retry_after_s` is set when it is RESOURCE_EXHAUSTED.
    """

    def __init__(self, status: grpc.StatusCode, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
