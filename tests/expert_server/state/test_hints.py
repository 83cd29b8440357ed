"""Requests from other peers are bounded, and no stranger keeps others' requests from being heard."""

from hypothesis import given
from hypothesis import strategies as st

from dht.uid import UID
from expert_server.state.servicer import FetchHint, HintQueue
from peer.identity import PeerID

ASKER, OTHER = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in (1, 2))
UIDS = tuple(UID(0, (n, 0)) for n in range(10))


def average(uid: UID, asker: PeerID = ASKER, sha256: bytes = b"a" * 32) -> FetchHint:
    return FetchHint(asker, (uid,), sha256, b"b" * 32, group=str(asker))


def adopt(asker: PeerID, uids: tuple[UID, ...], group: str = "") -> FetchHint:
    return FetchHint(asker, uids, group=group or str(asker))


def test_hints_of_a_kind_come_out_peer_by_peer() -> None:
    queue = HintQueue(10, 6.0)
    assert queue.put(average(UIDS[0]), 0.0) == 1
    assert queue.put(adopt(ASKER, UIDS[:2]), 0.0) == 2
    assert queue.put(adopt(OTHER, UIDS[3:5]), 0.0) == 2
    assert queue.put(adopt(ASKER, UIDS[2:3]), 0.0) == 1
    adoptions = [adopt(ASKER, UIDS[:3]), adopt(OTHER, UIDS[3:5])]
    assert [queue.pop(is_average=False) for _ in range(3)] == [*adoptions, None]
    assert [queue.pop(is_average=True) for _ in range(2)] == [average(UIDS[0]), None]


def test_no_more_wait_than_the_limit_and_peers_share_it() -> None:
    queue = HintQueue(4, 6.0)
    assert queue.put(adopt(ASKER, UIDS), 0.0) == 4
    assert queue.put(adopt(OTHER, UIDS[5:]), 0.0) == 2
    assert queue.pop(is_average=False) == adopt(ASKER, UIDS[:2])
    assert queue.pop(is_average=False) == adopt(OTHER, UIDS[5:7])
    assert queue.pop(is_average=False) is None


def test_an_expert_comes_again_only_after_a_while_from_the_same_peer() -> None:
    queue = HintQueue(100, 6.0)
    for _ in range(3):
        assert queue.put(average(UIDS[0]), 10.0) == 1
    assert queue.put(average(UIDS[0], OTHER), 10.0) == 1
    assert queue.put(average(UIDS[0], sha256=b"c" * 32), 15.9) == 0
    assert queue.put(average(UIDS[0], sha256=b"c" * 32), 16.0) == 1
    assert queue.pop(is_average=True) == average(UIDS[0], sha256=b"c" * 32), "the newest"
    assert queue.pop(is_average=True) == average(UIDS[0], OTHER)
    assert queue.put(adopt(ASKER, UIDS[:2]), 16.0) == 2
    assert queue.put(adopt(ASKER, UIDS[:2]), 16.5) == 0
    assert queue.put(adopt(ASKER, UIDS[:2]), 17.0) == 2


def test_one_peer_asks_for_no_more_experts_a_second_than_are_looked_up() -> None:
    queue = HintQueue(1000, 6.0)
    many = tuple(UID(0, (n, 0)) for n in range(256))
    took = 0
    for second in range(100):
        took += queue.put(adopt(ASKER, many), float(second))
        while queue.pop(is_average=False):
            pass
    assert took <= 2 * 256 + 32 * 100


@given(st.integers(1, 8), st.integers(1, 8), st.lists(st.integers(0, 7), max_size=20))
def test_however_many_strangers_ask_a_newcomer_has_its_share_and_its_turn(
    strangers: int, uids: int, order: list[int]
) -> None:
    queue = HintQueue(64, 6.0)
    peers = [PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(strangers)]
    for number in [*range(strangers), *(n % strangers for n in order)]:
        queue.put(adopt(peers[number], UIDS), 0.0)
    for number in order:
        queue.put(average(UIDS[number], peers[number % strangers]), 0.0)
    honest = PeerID(b"\x12\x20" + bytes([99]) * 32)
    share = min(uids, 64 // (strangers + 1))
    assert queue.put(adopt(honest, UIDS[:uids]), 0.0) >= share
    turns = [queue.pop(is_average=False) for _ in range(strangers + 1)]
    assert honest in {hint.peer_id for hint in turns if hint is not None}
    while queue.pop(is_average=False) or queue.pop(is_average=True):
        pass
    assert not queue._waiting
    assert queue._room.used == 0


def test_whoever_may_not_come_yet_holds_up_no_other() -> None:
    queue = HintQueue(64, 6.0)
    queue.put(average(UIDS[0]), 0.0)
    queue.put(average(UIDS[0], OTHER), 0.0)
    found = queue.pop(True, lambda owner: owner.name != ASKER)
    assert found is not None
    assert found.peer_id == OTHER
    assert queue.pop(True, lambda owner: owner.name != ASKER) is None
    assert queue.pop(True) is not None


def test_a_replica_that_always_asks_for_averages_gets_one_in_each_interval() -> None:
    """Others ask about once in every second interval, irregularly, and once more when they leave."""
    queue = HintQueue(64, 60.0)
    followed = 0
    for second in range(0, 3600, 2):
        queue.put(average(UIDS[0]), float(second))
        followed += queue.pop(is_average=True) is not None
    assert followed <= 3600 / 60 + 2
    assert queue.put(average(UIDS[0], OTHER), 3600.0) == 1


def test_many_keys_of_one_line_leave_a_leaving_peer_half_of_the_room_and_every_second_turn() -> None:
    queue, uids = HintQueue(64, 6.0), tuple(UID(0, (n, 0)) for n in range(40))
    for number in range(10, 210):
        key = PeerID(b"\x12\x20" + bytes([number]) * 32)
        queue.put(adopt(key, UIDS[:1], "one line"), 0.0)
    assert queue.put(adopt(OTHER, uids, "another"), 0.0) == 32
    first_two = queue.pop(is_average=False), queue.pop(is_average=False)
    assert OTHER in {hint.peer_id for hint in first_two if hint is not None}
