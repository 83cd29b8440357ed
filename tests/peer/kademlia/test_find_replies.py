"""The good parts of a DHT peer's answer are used, and the bad parts harm nobody."""

import asyncio
import time
from typing import Any

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from loop_lags import longest_slice

from peer.identity import PeerID
from peer.kademlia.hivemind import (
    DHTID,
    DHTRecord,
    MSGPackSerializer,
    RecordValidatorBase,
    dht_pb2,
)
from peer.kademlia.lookups import FindResult, find
from peer.kademlia.validation import MAX_ENTRIES, Entry, EntryChecker, node_id_of, pack_entries

KEY, OTHER = DHTID.generate(source="key"), DHTID.generate(source="other")
SOMEBODY = PeerID(b"\x12\x20" + bytes(32))
NAME = b"\x12\x20" + bytes([7]) * 32
NODE = bytes(range(20))
"""What a peer claims as its node ID, which counts for nothing."""


class OnlyGood(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    def validate(self, record: DHTRecord) -> bool:
        return bool(record.value == b"good")


class Protocol:
    """The part of hivemind's protocol that a request needs, with a made-up answer."""

    record_validator = OnlyGood()
    node_info = dht_pb2.NodeInfo()
    wait_timeout = 3.0
    bucket_size = 20

    def __init__(self, response: Any) -> None:
        self.response = response
        self.met: list[tuple[Any, bool]] = []

    def get_stub(self, peer: PeerID) -> "Protocol":
        return self

    async def rpc_find(self, request: Any, timeout: float) -> Any:  # noqa: ASYNC109  # hivemind's
        if isinstance(self.response, Exception):
            raise self.response
        return self.response

    async def update_routing_table(self, node: Any, peer: PeerID, responded: bool = True) -> None:
        self.met.append((node, responded))


def ask(protocol: Any) -> dict[DHTID, FindResult] | None:
    return asyncio.run(find(protocol, SOMEBODY, [KEY], EntryChecker()))


def response(node_id: bytes = NODE, **result: Any) -> Any:
    made = dht_pb2.FindResponse(peer=dht_pb2.NodeInfo(node_id=node_id))
    made.results.append(dht_pb2.FindResult(**result))
    return made


def dictionary(entries: dict[int, tuple[bytes, float]]) -> bytes:
    return pack_entries({subkey: Entry(*entry) for subkey, entry in entries.items()})


def test_good_entries_and_neighbours_are_taken_and_the_peer_is_remembered() -> None:
    until = time.time() + 10
    value = dictionary({1: (b"good", until), 2: (b"bad", until)})
    protocol = Protocol(
        response(type=dht_pb2.FOUND_DICTIONARY, value=value, nearest_node_ids=[NODE], nearest_peer_ids=[NAME])
    )
    answers = ask(protocol)
    assert answers is not None
    assert answers[KEY].nearer == {node_id_of(NAME): NAME}
    assert {subkey: entry.value for subkey, entry in answers[KEY].entries.items()} == {1: b"good"}
    assert protocol.met == [(node_id_of(SOMEBODY.to_bytes()), True)]


@pytest.mark.parametrize(
    "value", [b"", b"\xc1", MSGPackSerializer.dumps([1]), b"\x91" * 5000, b"\xc7\x01\x50\xc1"]
)
def test_a_value_that_is_no_dictionary_is_none(value: bytes) -> None:
    answers = ask(Protocol(response(type=dht_pb2.FOUND_DICTIONARY, value=value)))
    assert answers == {KEY: FindResult({}, {})}


def test_a_plain_value_is_none() -> None:
    assert ask(Protocol(response(type=dht_pb2.FOUND_REGULAR, value=b"good"))) == {KEY: FindResult({}, {})}


def test_neighbours_with_wrong_names_and_those_beyond_20_are_left_out() -> None:
    others = [b"\x12\x20" + bytes([n]) * 32 for n in range(10, 50)]
    answers = ask(Protocol(response(nearest_peer_ids=[bytes(1000), b"", *others])))
    assert answers is not None
    assert answers[KEY].nearer == {node_id_of(name): name for name in others[:18]}


def test_a_neighbour_has_one_place_whatever_is_claimed_for_it() -> None:
    ids = [n.to_bytes(20, "big") for n in range(10)]
    answers = ask(Protocol(response(nearest_node_ids=ids, nearest_peer_ids=[NAME] * 10)))
    assert answers is not None
    assert answers[KEY].nearer == {node_id_of(NAME): NAME}


def test_fewer_answers_than_keys_are_for_the_first_keys_and_more_are_none() -> None:
    answer = response()
    answers = asyncio.run(find(Protocol(answer), SOMEBODY, [KEY, OTHER], EntryChecker()))
    assert answers is not None
    assert list(answers) == [KEY]
    answer.results.append(answer.results[0])
    answer.results.append(answer.results[0])
    assert asyncio.run(find(Protocol(answer), SOMEBODY, [KEY, OTHER], EntryChecker())) is None


def test_a_full_answer_of_forged_records_does_not_hold_the_loop() -> None:
    """Nor do many at once."""
    entries = {n: (b"bad", time.time() + 10) for n in range(MAX_ENTRIES)}
    protocol = Protocol(response(type=dht_pb2.FOUND_DICTIONARY, value=dictionary(entries)))
    checker = EntryChecker()

    async def run() -> float:
        return await longest_slice(
            asyncio.gather(*(find(protocol, SOMEBODY, [KEY], checker) for _ in range(20)))
        )

    assert asyncio.run(run()) < 0.05


@pytest.mark.parametrize(
    "said", [TimeoutError(), P2PDaemonError("gone"), ConnectionResetError(), dht_pb2.FindResponse()]
)
def test_a_peer_that_does_not_answer_what_was_asked_is_forgotten(said: Any) -> None:
    protocol = Protocol(said)
    assert ask(protocol) is None
    assert protocol.met == [(node_id_of(SOMEBODY.to_bytes()), False)]


def test_a_client_that_answers_is_not_remembered() -> None:
    protocol = Protocol(response(node_id=b""))
    assert ask(protocol) == {KEY: FindResult({}, {})}
    assert protocol.met == []
