"""The good parts of a DHT peer's answer are used, and the bad parts do no harm."""

import asyncio
import time
from collections.abc import Container
from typing import Any

import pytest
from google.protobuf.message import Message
from loop_lags import longest_slice

from benchmarks.simulated_p2p import NoContacts
from peer.clock import SwarmClock
from peer.identity import PeerID
from peer.kademlia.node import FindResult, Handler, KademliaNode
from peer.kademlia.routing import key_id_of, node_id_of
from peer.kademlia.validation import MAX_ENTRIES, Entry, EntryChecker, Record, pack, pack_entries
from peer.wire import contact_pb2, dht_pb2

KEY, OTHER = key_id_of("key"), key_id_of("other")
SOMEBODY = PeerID(b"\x12\x20" + bytes(32))
NAME = b"\x12\x20" + bytes([7]) * 32
NODE = bytes(range(20))
"""What a peer claims as its node ID. The claim is ignored."""


class OnlyGood:
    def validate(self, record: Record) -> bool:
        return bool(record.value == b"good")


class Canned:
    """A transport that gives one answer to every call."""

    peer_id = PeerID(b"\x12\x20" + bytes([1]) * 32)

    contacts = NoContacts()

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer

    def own_contact(self) -> None:
        return None

    async def call(self, peer_id: PeerID, method: str, request: bytes, deadline_s: float) -> bytes | None:
        return self.answer

    async def serve(self, method: str, handler: Handler) -> None:
        raise AssertionError("nobody asks it")


def asking(answer: Message | bytes | None) -> KademliaNode:
    """A node that gets this answer to every call."""
    data = answer.SerializeToString() if isinstance(answer, Message) else answer
    return KademliaNode(Canned(data), OnlyGood())


def ask(answer: Message) -> dict[int, FindResult] | None:
    return asyncio.run(asking(answer).find(SOMEBODY, [KEY], EntryChecker()))


def response(node_id: bytes = NODE, **result: Any) -> Any:
    made = dht_pb2.FindResponse(peer=dht_pb2.NodeInfo(node_id=node_id))
    made.results.append(dht_pb2.FindResult(**result))
    return made


def dictionary(entries: dict[int, tuple[bytes, float]]) -> bytes:
    return pack_entries({subkey: Entry(*entry) for subkey, entry in entries.items()})


class OneNeighbourhood(NoContacts):
    """Contacts that are all in one home."""

    def neighbourhood_of(self, peer_id: PeerID) -> str:
        return "192.0.2.0/24"


@pytest.mark.parametrize(("near", "voices"), [(False, 3), (True, 1)])
def test_each_neighbourhood_has_one_voice_about_the_time(
    near: bool, voices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SwarmClock(time.time, time.monotonic)
    monkeypatch.setattr("peer.clock.CLOCK", machine)
    node = asking(dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=NODE), dht_time=time.time() - 60))
    if near:
        monkeypatch.setattr(Canned, "contacts", OneNeighbourhood())
    for number in range(3):
        assert asyncio.run(node.ping(PeerID(b"\x12\x20" + bytes([2 + number]) * 32)))
    machine.note("one", time.time())
    machine.note("other", time.time())
    assert machine.ahead_s == pytest.approx(60.0 if voices == 3 else 0.0, abs=2)


def test_a_peer_that_tells_no_time_has_no_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SwarmClock(time.time, time.monotonic)
    monkeypatch.setattr("peer.clock.CLOCK", machine)
    node = asking(dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=NODE)))
    assert asyncio.run(node.ping(SOMEBODY))
    assert not machine.warning


def test_good_entries_and_neighbours_are_taken_and_the_peer_is_remembered() -> None:
    until = time.time() + 10
    value = dictionary({1: (b"good", until), 2: (b"bad", until)})
    kind = dht_pb2.RESULT_TYPE_DICTIONARY
    node = asking(response(type=kind, value=value, nearest_peer_ids=[NAME]))
    answers = asyncio.run(node.find(SOMEBODY, [KEY], EntryChecker()))
    assert answers is not None
    assert answers[KEY].nearer == {node_id_of(NAME): PeerID(NAME)}
    assert {subkey: entry.value for subkey, entry in answers[KEY].entries.items()} == {1: b"good"}
    assert dict(node.table) == {node_id_of(SOMEBODY.to_bytes()): SOMEBODY}


@pytest.mark.parametrize("value", [b"", b"\xc1", pack([1]), b"\x91" * 5000, b"\xc7\x01\x50\xc1"])
def test_a_value_that_is_no_dictionary_is_none(value: bytes) -> None:
    answers = ask(response(type=dht_pb2.RESULT_TYPE_DICTIONARY, value=value))
    assert answers == {KEY: FindResult({}, {})}


def test_a_plain_value_is_none() -> None:
    assert ask(response(type=dht_pb2.RESULT_TYPE_PLAIN, value=b"good")) == {KEY: FindResult({}, {})}


def test_neighbours_with_wrong_names_and_those_beyond_20_are_left_out() -> None:
    others = [b"\x12\x20" + bytes([n]) * 32 for n in range(10, 50)]
    answers = ask(response(nearest_peer_ids=[bytes(1000), b"", *others]))
    assert answers is not None
    assert answers[KEY].nearer == {node_id_of(name): PeerID(name) for name in others[:18]}


def test_no_more_contacts_are_read_than_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read one takes a twentieth of a millisecond, whoever it belongs to."""

    class Counting(NoContacts):
        read = 0

        def learn(self, message: contact_pb2.Contact, whose: Container[PeerID]) -> PeerID | None:
            self.read += 1
            return None

    contacts = Counting()
    monkeypatch.setattr(Canned, "contacts", contacts)
    answer = response(nearest_peer_ids=[NAME])
    answer.contacts.extend([contact_pb2.Contact(statement=b"stranger")] * 300)
    assert ask(answer) is not None
    assert contacts.read == 1


def test_fewer_answers_than_keys_are_for_the_first_keys_and_more_are_none() -> None:
    answer = response()
    answers = asyncio.run(asking(answer).find(SOMEBODY, [KEY, OTHER], EntryChecker()))
    assert answers is not None
    assert list(answers) == [KEY]
    answer.results.append(answer.results[0])
    answer.results.append(answer.results[0])
    assert asyncio.run(asking(answer).find(SOMEBODY, [KEY, OTHER], EntryChecker())) is None


def test_a_full_answer_of_forged_records_does_not_hold_the_loop() -> None:
    """Several such answers at once do not block it either."""
    entries = {n: (b"bad", time.time() + 600) for n in range(MAX_ENTRIES)}
    node = asking(response(type=dht_pb2.RESULT_TYPE_DICTIONARY, value=dictionary(entries)))
    checker = EntryChecker()

    async def run() -> float:
        return await longest_slice(
            lambda: asyncio.gather(*(node.find(SOMEBODY, [KEY], checker) for _ in range(20)))
        )

    assert asyncio.run(run()) < 0.05


@pytest.mark.parametrize("said", [None, b"\xff", dht_pb2.FindResponse()])
def test_a_peer_that_does_not_answer_what_was_asked_is_forgotten(said: Any) -> None:
    node = asking(said)
    node.table.add(node_id_of(SOMEBODY.to_bytes()), SOMEBODY)
    assert asyncio.run(node.find(SOMEBODY, [KEY], EntryChecker())) is None
    assert not len(node.table)


def test_a_client_that_answers_is_not_remembered() -> None:
    node = asking(response(node_id=b""))
    assert asyncio.run(node.find(SOMEBODY, [KEY], EntryChecker())) == {KEY: FindResult({}, {})}
    assert not len(node.table)
