"""What others ask for is bounded, whoever asks how often."""

from dht.uid import UID
from expert_server.state.servicer import FetchHint, HintQueue
from peer.identity import PeerID

ASKER, OTHER = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in (1, 2))
UIDS = tuple(UID(0, (n, 0)) for n in range(10))


def average(uid: UID, asker: PeerID = ASKER) -> FetchHint:
    return FetchHint(asker, (uid,), b"a" * 32, b"b" * 32)


def test_hints_come_out_in_order_with_adoptions_first() -> None:
    queue = HintQueue(10, 6.0)
    adopt = [FetchHint(ASKER, UIDS[:3]), FetchHint(OTHER, UIDS[3:5])]
    assert queue.put(average(UIDS[0]), 0.0) == 1
    assert [queue.put(hint, 0.0) for hint in adopt] == [3, 2]
    assert [queue.pop() for _ in range(4)] == [*adopt, average(UIDS[0]), None]


def test_no_more_wait_than_the_limit() -> None:
    queue = HintQueue(4, 6.0)
    assert queue.put(FetchHint(ASKER, UIDS[:3]), 0.0) == 3
    assert queue.put(FetchHint(OTHER, UIDS[3:]), 0.0) == 1
    assert queue.put(FetchHint(OTHER, UIDS[5:]), 0.0) == 0
    assert queue.put(average(UIDS[9]), 0.0) == 0
    assert (queue.pop(), queue.pop()) == (FetchHint(ASKER, UIDS[:3]), FetchHint(OTHER, UIDS[3:4]))
    assert queue.pop() is None
    assert queue.put(FetchHint(OTHER, UIDS[5:]), 0.0) == 4


def test_an_expert_comes_again_only_after_a_while_whoever_asks() -> None:
    queue = HintQueue(100, 6.0)
    assert queue.put(average(UIDS[0]), 10.0) == 1
    assert queue.put(average(UIDS[0], OTHER), 15.9) == 0
    assert queue.put(average(UIDS[1]), 15.9) == 1
    assert queue.put(average(UIDS[0], OTHER), 16.0) == 1
    assert queue.put(FetchHint(ASKER, UIDS[:2]), 16.0) == 2
    assert queue.put(FetchHint(ASKER, UIDS[:2]), 16.5) == 0
    assert queue.put(FetchHint(ASKER, UIDS[:2]), 17.0) == 2
