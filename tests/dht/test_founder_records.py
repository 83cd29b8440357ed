"""The manifest's record never expires as long as its founder is online now and then."""

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from dht.founder_records import LIFETIME_S, ManifestRecord, Revocations
from dht.records import FounderRecord, SwarmKeys
from peer.identity import PeerID
from peer.wire import records_pb2

FOUNDER, OTHER = PeerID(b"\x12\x20" + bytes(32)), PeerID(b"\x12\x20" + bytes([1]) * 32)
DAY_S = 86400.0
JSON = b'{"name": "sauna"}'


def signed(number: int, expires_at: float) -> FounderRecord:
    payload = records_pb2.RecordPayload(expires_at=expires_at, manifest_json=JSON)
    return FounderRecord(f"record {number}".encode(), payload)


class Records:
    """A DHT that holds records of the manifest and drops expired ones. Its clock is a number."""

    def __init__(self, nodes: float = 5.0) -> None:
        """`nodes`: how many nodes peers estimate to be in the DHT."""
        self.now = 0.0
        self.nodes = nodes
        self.signed = 0
        self.stored = 0
        self.looks = 0
        self.held = signed(0, LIFETIME_S)

    def registry(self, peer_id: PeerID) -> Any:
        records = self

        class Registry:
            keys = SwarmKeys("sauna", FOUNDER)

            def __init__(self) -> None:
                self.peer_id = peer_id
                self.lookups = SimpleNamespace(estimated_nodes=records.nodes)

            def sign_manifest(self, manifest_json: bytes, expires_at: float) -> FounderRecord:
                assert peer_id == FOUNDER
                assert manifest_json == JSON
                records.signed += 1
                return signed(records.signed, expires_at)

            async def find_founder_record(self, key: str) -> FounderRecord | None:
                records.looks += 1
                return records.held if records.held.expires_at > records.now else None

            def read_founder_record(self, key: str, value: object) -> None:
                assert value is None, "nothing is on disk"

            async def republish(self, record: FounderRecord) -> None:
                records.stored += 1
                if record.expires_at > max(records.now, records.held.expires_at):
                    records.held = record

        return Registry()

    def kept_by(self, peer_id: PeerID) -> ManifestRecord:
        return ManifestRecord(self.registry(peer_id), self.held, now=lambda: self.now)


def live(records: Records, peers: Iterable[ManifestRecord], days: int) -> None:
    async def run() -> None:
        for _ in range(24 * days):
            records.now += DAY_S / 24
            for peer in peers:
                await peer.republish()

    asyncio.run(run())


def test_the_founder_signs_anew_half_way_and_the_manifest_stays_the_same() -> None:
    records = Records()
    founder = records.kept_by(FOUNDER)
    live(records, [founder], 14)
    assert records.signed == 0
    live(records, [founder], 2)
    assert records.signed == 1
    assert founder.newest.data == records.held.data == b"record 1"
    live(records, [founder], 60)
    assert records.held.expires_at > records.now + LIFETIME_S / 2 - DAY_S
    assert records.signed == 5


def test_others_take_the_renewed_record_and_keep_it_alive_when_its_holders_have_gone() -> None:
    records = Records()
    founder, other = records.kept_by(FOUNDER), records.kept_by(OTHER)
    live(records, [founder, other], 16)
    assert other.newest.data == founder.newest.data == b"record 1"
    looks = records.looks
    live(records, [other], 10)
    assert records.looks == looks, "a fresh record is not looked for"
    records.held = signed(0, 0.0)
    live(records, [other], 1)
    assert records.held == founder.newest


def test_others_warn_in_the_last_week_before_nobody_can_join(caplog: pytest.LogCaptureFixture) -> None:
    records = Records()
    founder, other = records.kept_by(FOUNDER), records.kept_by(OTHER)
    live(records, [other], 22)
    assert not caplog.messages
    assert not other.warning
    live(records, [other], 2)
    assert "unless its founder runs a node" in caplog.messages[-1]
    assert other.warning == caplog.messages[-1]
    live(records, [founder, other], 1)
    caplog.clear()
    live(records, [founder, other], 10)
    assert not caplog.messages


def test_a_founder_that_was_away_renews_when_it_is_back() -> None:
    records = Records()
    founder, other = records.kept_by(FOUNDER), records.kept_by(OTHER)
    live(records, [other], 29)
    live(records, [founder, other], 1)
    assert records.held.expires_at > records.now + LIFETIME_S - 2 * DAY_S


def test_in_a_large_swarm_a_few_store_it_in_each_round() -> None:
    records = Records(nodes=1000.0)
    peers = [records.kept_by(OTHER) for _ in range(1000)]
    live(records, peers, 1)
    assert 24 * 8 * 0.7 < records.stored < 24 * 8 * 1.3, "eight in each of 24 rounds"


def test_in_a_large_swarm_a_few_store_the_revoked_tokens_in_each_round() -> None:
    records = Records(nodes=1000.0)
    admission: Any = SimpleNamespace(mode="token", revoke=lambda serials: None)
    peers = [Revocations(records.registry(OTHER), admission) for _ in range(1000)]

    async def run() -> None:
        for peer in peers:
            await peer.read()
        for _ in range(24):
            for peer in peers:
                await peer.keep()

    asyncio.run(run())
    assert 24 * 8 * 0.7 < records.stored < 24 * 8 * 1.3
