"""What is sent in one forward pass of one layer, and what it brought.

Shapes: R rows, K experts for each row, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hivemind.p2p import PeerID

from dht.beam_search import Selection
from peer.codec import Floats
from trainer_client.calls import KeptAt, Request
from trainer_client.dispatch.batches import Booleans, Integers, Share


@dataclass(frozen=True)
class RoutedRows:
    """What is sent in one forward pass, and the scores by which each row chooses its k experts."""

    layer: int
    inputs: Floats  # [R, D]
    scores: Sequence[Floats]  # one [R, G_d] per grid dimension
    k: int
    sequence_length: int
    keep: bool
    first: Selection | None
    """Whom to ask first; None: the best. Where one of them has gone since, all rows ask their best."""

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(table.shape[1] for table in self.scores)


@dataclass(frozen=True)
class AnsweredShare:
    """A share that was answered, by whom, and for which of its rows [r] the answer counts."""

    share: Share
    peer_id: PeerID
    counts: Booleans
    kept: KeptAt | None = None

    def request(self, inputs: Floats, gradients: Floats) -> Request:
        """Its backward request: the gradients [R, K, D] of its rows, zero where the slot has another's answer."""
        own = gradients[self.share.rows, self.share.slots]
        if not self.counts.all():
            own[~self.counts] = 0
        return request_of(self.share, inputs, own, kept=self.kept)


@dataclass
class ForwardPass:
    """What the forward calls of one layer brought, and what the backward calls need."""

    layer: int
    sequence_length: int
    inputs: Floats  # [R, D]
    outputs: Floats  # [R, K, D]; zeros where nobody answered
    answered: Booleans  # [R, K]
    coordinates: Integers  # [R, K, dims], of the expert in each slot
    answers: list[AnsweredShare] = field(default_factory=list)


def request_of(
    share: Share,
    inputs: Floats,
    gradients: Floats | None,
    *,
    keep: bool = False,
    kept: KeptAt | None = None,
) -> Request:
    """What the expert of a share is asked, of the pass's inputs [R, D]."""
    return Request(
        share.uid,
        share.lengths.tolist(),
        share.positions.tolist(),
        inputs[share.rows],
        gradients,
        keep,
        kept,
    )
