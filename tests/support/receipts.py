"""Receipts for tests; they have signatures only where these are checked."""

from hypothesis import strategies as st

from dht.receipts import MOST, Receipt, Work
from peer.identity import PeerID
from peer.wire import credit_pb2


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def receipt(trainer: int, work: Work) -> Receipt:
    """A receipt as if it had been checked."""
    return Receipt(peer(trainer), work, work.pairs, None, credit_pb2.SignedReceipt(receipt=bytes([trainer])))


@st.composite
def works(draw: st.DrawFn, most: int = 1000) -> Work:
    """Totals that an honest trainer may sign."""
    pairs = draw(st.integers(1, min(most, MOST)))
    updates = draw(st.integers(0, pairs))
    passed = draw(st.integers(0, pairs))
    return Work(
        pairs, updates, draw(st.integers(0, most)), passed, draw(st.integers(0, min(3, pairs - passed)))
    )


@st.composite
def histories(draw: st.DrawFn, most: int = 5) -> list[Work]:
    """The growing totals of one trainer for one node."""
    found = [draw(works())]
    for step in draw(st.lists(works(), max_size=most - 1)):
        found.append(found[-1] + step)
    return found
