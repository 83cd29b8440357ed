"""Of what another peer answers, the good entries are used, and nothing that it says of the whole is believed."""

import asyncio
import math
import time
from typing import Any

import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration

from peer.answers import MAX_ENTRIES, filter_answers, keep_valid

KEY = DHTID.generate(source="key")
SOMEBODY = PeerID(b"\x12\x20" + bytes(32))


class OnlyGood(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    def validate(self, record: DHTRecord) -> bool:
        return bool(record.value == b"good")


def dictionary(entries: dict[object, tuple[bytes, float]]) -> Any:
    made = DictionaryDHTValue()
    for subkey, (value, expires_at) in entries.items():
        made.store(subkey, value, expires_at)
    return made


class Protocol:
    """What hivemind's protocol does with an answer."""

    record_validator = OnlyGood()

    def __init__(self, value: object, expires_at: float) -> None:
        self._item = ValueWithExpiration(value, expires_at)
        self._validate_dictionary: Any = None

    async def call_find(self, peer_id: PeerID, keys: Any) -> Any:
        if isinstance(self._item.value, DictionaryDHTValue):
            assert self._validate_dictionary(KEY.to_bytes(), self._item.value)
        return {KEY: (self._item, {KEY: peer_id})}


def find(value: object, expires_at: float) -> Any:
    protocol: Any = Protocol(value, expires_at)
    filter_answers(protocol)
    item, nearest = asyncio.run(protocol.call_find(SOMEBODY, [KEY]))[KEY]
    assert nearest == {KEY: SOMEBODY}
    return item


@pytest.mark.parametrize("said", [math.inf, 0.0, math.nan])
def test_an_answer_expires_with_its_good_entries(said: float) -> None:
    now = time.time()
    entries = {1: (b"good", now + 10), 2: (b"bad", now + 99), 3: (b"good", now + 20), 4: (b"bad", math.inf)}
    item = find(dictionary(entries), said)  # type: ignore[arg-type]
    assert item.expiration_time == item.value.latest_expiration_time == now + 20
    assert {subkey: entry.value for subkey, entry in item.value.items()} == {1: b"good", 3: b"good"}


def test_an_answer_with_no_good_entry_is_none() -> None:
    assert find(dictionary({1: (b"bad", time.time() + 10)}), math.inf) is None


def test_a_plain_value_stays_what_it_is() -> None:
    assert find(b"plain", 5.0) == ValueWithExpiration(b"plain", 5.0)


def test_a_peer_that_does_not_answer_gives_none() -> None:
    protocol: Any = Protocol(b"", 0.0)

    async def silent(peer_id: PeerID, keys: Any) -> None:
        return None

    protocol.call_find = silent
    filter_answers(protocol)
    assert asyncio.run(protocol.call_find(SOMEBODY, [KEY])) is None


def test_too_many_entries_are_cut_to_some_that_are_drawn() -> None:
    until = time.time() + 100
    lost = set()
    for _ in range(2):
        many = dictionary(dict.fromkeys(range(MAX_ENTRIES + 500), (b"good", until)))
        assert keep_valid(OnlyGood(), b"key", many)
        kept = {subkey for subkey, _ in many.items()}
        assert len(kept) == MAX_ENTRIES
        lost |= set(range(MAX_ENTRIES + 500)) - kept
    assert len(lost) > 500
