"""The good entries of what another peer answers or hands over are used."""

import math
import time
from types import SimpleNamespace
from typing import Any

from peer.kademlia.hivemind import DHTRecord, DictionaryDHTValue, RecordValidatorBase
from peer.kademlia.validation import MAX_ENTRIES, drop_invalid_entries, patch_validation


class OnlyGood(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    def validate(self, record: DHTRecord) -> bool:
        return bool(record.value == b"good")


def dictionary(entries: dict[object, tuple[bytes, float]]) -> Any:
    made = DictionaryDHTValue()
    for subkey, (value, expires_at) in entries.items():
        made.store(subkey, value, expires_at)
    return made


def test_a_dictionary_that_is_handed_over_loses_its_bad_entries() -> None:
    now = time.time()
    entries = {1: (b"good", now + 10), 2: (b"bad", now + 99), 3: (b"good", now + 20), 4: (b"bad", math.inf)}
    handed_over, protocol = dictionary(entries), SimpleNamespace(record_validator=OnlyGood())  # type: ignore[arg-type]
    patch_validation(protocol)
    assert protocol._validate_dictionary(b"key", handed_over)
    assert {subkey: entry.value for subkey, entry in handed_over.items()} == {1: b"good", 3: b"good"}


def test_too_many_entries_are_sampled() -> None:
    until = time.time() + 100
    lost = set()
    for _ in range(2):
        many = dictionary(dict.fromkeys(range(MAX_ENTRIES + 500), (b"good", until)))
        assert drop_invalid_entries(OnlyGood(), b"key", many)
        kept = {subkey for subkey, _ in many.items()}
        assert len(kept) == MAX_ENTRIES
        lost |= set(range(MAX_ENTRIES + 500)) - kept
    assert len(lost) > 500
