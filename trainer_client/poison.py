"""Answers that no honest expert gives: seen by the answer alone, with no second opinion. Pure and bounded.

Experts carry their own residual connection: what they answer stays near its input in size and follows it. Wrong shapes
and numbers that are not finite are refused before, where a call is read.

Shapes: R rows, D hidden size.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from hivemind.p2p import PeerID

from peer.codec import Floats

MOST_GROWTH = 1000.0
"""An answer's largest number, against one and the largest that it was computed from."""
MOST_GRADIENT_GROWTH = 1e6
"""The same for gradients: the norm of a row whose numbers are nearly equal makes them large, by 1/√ε at most."""
_APART = 0.1
"""How far two rows must be apart, against their size, that no expert and no codec makes one of them."""
_COMPARED = 64
"""Columns of a row that are kept to compare it."""
_REMEMBERED_ROWS = 8
_REMEMBERED_PEERS = 256


@dataclass(frozen=True)
class _Kept:
    """The first row of an answer, and of what it was computed from."""

    answer: bytes
    inputs: Floats


class PoisonTest:
    """What is wrong with answers, by each one alone and by those that the same peer gave lately."""

    def __init__(self) -> None:
        self._lately: OrderedDict[PeerID, list[_Kept]] = OrderedDict()

    def fault_of_gradient(self, gradients_RD: Floats, answer_RD: Floats) -> str | None:
        """In a word, or None. Small gradients may well become zeros on their way, and so equal."""
        return "huge" if is_huge(gradients_RD, answer_RD, MOST_GRADIENT_GROWTH) else None

    def fault(self, peer_id: PeerID, inputs_RD: Floats, answer_RD: Floats) -> str | None:
        """In a word, or None."""
        if is_huge(inputs_RD, answer_RD):
            return "huge"
        if is_constant(inputs_RD, answer_RD):
            return "constant"
        return "replayed" if self._is_replayed(peer_id, inputs_RD[0], answer_RD[0]) else None

    def _is_replayed(self, peer_id: PeerID, inputs_D: Floats, answer_D: Floats) -> bool:
        """Whether the answer's first row came lately, for other inputs. Also remembers it."""
        lately = self._lately.setdefault(peer_id, [])
        self._lately.move_to_end(peer_id)
        if len(self._lately) > _REMEMBERED_PEERS:
            self._lately.popitem(last=False)
        row, compared = answer_D.tobytes(), inputs_D[:_COMPARED].copy()
        for kept in lately:
            if kept.answer == row:
                return are_apart(kept.inputs, compared)
        lately.append(_Kept(row, compared))
        del lately[:-_REMEMBERED_ROWS]
        return False


def is_huge(inputs_RD: Floats, answer_RD: Floats, most_growth: float = MOST_GROWTH) -> bool:
    return _largest(answer_RD) > most_growth * (1.0 + _largest(inputs_RD))


def is_constant(inputs_RD: Floats, answer_RD: Floats) -> bool:
    """Whether rows that are far apart were all given the same answer."""
    if len(answer_RD) < 2 or not np.array_equal(answer_RD[0], answer_RD[-1]):
        return False
    return are_apart(inputs_RD[0], inputs_RD[-1]) and bool((answer_RD == answer_RD[0]).all())


def are_apart(one_D: Floats, other_D: Floats) -> bool:
    size = max(float(np.linalg.norm(one_D)), float(np.linalg.norm(other_D)))
    return float(np.linalg.norm(one_D - other_D)) > _APART * size


def _largest(numbers_RD: Floats) -> float:
    return max(float(numbers_RD.max(initial=0.0)), -float(numbers_RD.min(initial=0.0)))
