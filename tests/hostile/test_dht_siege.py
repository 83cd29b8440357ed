"""Strangers besiege a node's DHT: its loop is not blocked, it sends no flood, and honest look-ups succeed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgpack
import pytest
from loop_lags import Bystander, LoopLags, exposed_at
from stranger import Stranger, new_identities, packed
from victim import NodeVictim, founder

from dht.records import sign_record
from dht.swarm import Swarm
from dht.uid import UID
from peer.errors import UnreachableError
from peer.identity import Identity
from peer.kademlia.validation import MAX_FIND_KEYS, MAX_ITEMS, Entries, Entry, pack_entries
from peer.loop import LoopThread
from peer.wire import dht_pb2, records_pb2

ATTACK_S = 1.0
LOOKS = 20
LOOK_S, _PATIENCE_S = 3.0, 30.0
"""The longest time for a look-up on a core of its own, and on any machine."""
DEADLINE_S = 240.0
LOOPS = 6
UPLOAD_MBIT = 8.0
FORGED = 480
"""Records under one key: as many as fit in one message."""
BODIES, BATCHES = 3700, 12
"""Empty bodies of two kinds in a record of 16 KB, which takes 1.8 MB of memory once it is parsed, and the messages with
seven such records each.
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeVictim]:
    """A node whose announcements live for 15 s."""
    folder = tmp_path_factory.mktemp("besieged")
    with founder(folder, announce_every_s=5, upload_mbit=UPLOAD_MBIT) as victim:
        yield victim


class HonestReader:
    """A client of the DHT that looks up all experts and the node again and again."""

    def __init__(self, swarm: Swarm) -> None:
        self.looks = self.failed = 0
        self.longest_s = 0.0
        self._swarm = swarm

    async def read_for(self, seconds: float) -> None:
        with Bystander() as bystander:
            await self._read_for(seconds, bystander)

    async def _read_for(self, seconds: float, bystander: Bystander) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.looks += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    found = await self._swarm.experts.replicas(self._swarm.manifest.uids())
                    nodes = await self._swarm.registry.nodes([self._swarm.keys.author])
                is_late = time.monotonic() - began > bystander.allows(LOOK_S)
                self.failed += is_late or not all(found.values()) or not nodes
            except (TimeoutError, UnreachableError):
                self.failed += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            await asyncio.sleep(0.05)

    @property
    def share(self) -> float:
        return 1 - self.failed / self.looks


class Siege:
    def __init__(self, node: NodeVictim, stranger: Stranger, reader: HonestReader) -> None:
        self.node = node
        self.stranger = stranger
        self.reader = reader
        self.victim = stranger.keys.author
        self.sent = self.answered = self.received_bytes = 0
        """The number of requests, of answers, and of the answers' bytes."""
        self._is_over = False

    async def lasts(self, *attackers: Any, is_enough: Callable[[], bool]) -> LoopLags:
        """While attacks run, each in several loops at once, honest look-ups continue. A busy machine needs longer."""
        lags = LoopLags(exposed_at(self.node.metrics_address))
        tasks = [asyncio.create_task(self._repeat(attack)) for attack in attackers for _ in range(LOOPS)]
        await self.reader.read_for(ATTACK_S)
        ends = time.monotonic() + DEADLINE_S
        while self.reader.looks < LOOKS or not await asyncio.to_thread(is_enough):
            assert time.monotonic() < ends, "the attack was no attack"
            await self.reader.read_for(0.5)
        self._is_over = True
        await asyncio.gather(*tasks)
        return lags

    async def _repeat(self, attack: Any) -> None:
        number = 0
        while not self._is_over:
            number += 1
            self.sent += 1
            try:
                answer = await attack(number)
            except TimeoutError:
                await asyncio.sleep(0)
                continue
            self.answered += 1
            self.received_bytes += answer.ByteSize()

    def check(self) -> None:
        """Checks that the node is alive and that its readers found it."""
        print(f"{self.sent} sent, {self.answered} answered, {self.received_bytes} bytes")
        print(
            f"{self.reader.looks} looks, {self.reader.failed} failed, at most {self.reader.longest_s:.2f} s"
        )
        assert self.node.alive
        assert self.reader.share >= 0.95, f"{self.reader.failed} of {self.reader.looks} look-ups failed"


@contextlib.asynccontextmanager
async def siege_of(node: NodeVictim) -> AsyncIterator[Siege]:
    async with contextlib.AsyncExitStack() as stack:
        stranger = await stack.enter_async_context(Stranger.joined(node.invite))
        client = await stack.enter_async_context(Stranger.joined(node.invite, serves_dht=False))
        yield Siege(node, stranger, HonestReader(client.swarm))


def forged_records(siege: Siege, writers: list[Identity], key: str, until: float) -> dict[Any, Entry]:
    """Records that are valid apart from the signature."""
    entries = {}
    for writer in writers:
        body = records_pb2.Announcement(state=records_pb2.REPLICA_STATE_SERVING)
        payload = records_pb2.RecordPayload(key=key, expires_at=until, announcement=body)
        record = bytearray(sign_record(writer, payload))
        record[-1] ^= 1
        entries[writer.peer_id.to_bytes()] = Entry(packed(bytes(record)), until)
    return entries


def tiny_entries(count: int, until: float) -> bytes:
    """Any number of entries, packed as hivemind packs them."""
    rows = [[n % 128, b"", until] for n in range(count)]
    data: bytes = msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([None, until, rows])))
    return data


def test_a_siege_with_large_and_many_messages_holds_no_loop(loop: LoopThread, node: NodeVictim) -> None:
    async def scenario() -> None:
        async with siege_of(node) as siege:
            stranger, until = siege.stranger, time.time() + 300
            keys = [stranger.keys.expert(UID(0, (0, n))) for n in range(2)]
            writers = new_identities(FORGED)
            huge, tiny = tiny_entries(105_000, until), tiny_entries(9000, until)
            assert len(huge) > 0.9 * 2**20
            forged = [
                stranger.store_request(
                    [(key, b"", pack_entries(forged_records(siege, writers, key, until)), until)]
                )
                for key in keys
            ]
            assert all(80_000 < request.ByteSize() < 128 * 2**10 for request in forged)

            async def lie(request: Any, context: Any) -> Any:
                """Every other answer is far larger than a DHT message may be; the others just fit."""
                value = [huge * 2, tiny, forged[0].values[0], forged[1].values[0]][siege.sent % 4]
                results = [
                    dht_pb2.FindResult(type=dht_pb2.RESULT_TYPE_DICTIONARY, value=value if n == 0 else b"")
                    for n in range(len(request.keys))
                ]
                return dht_pb2.FindResponse(results=results, peer=stranger.dht.info)

            async def stuff(number: int) -> Any:
                rows = [(key, b"", huge if number % 2 else tiny, until) for key in keys]
                return await stranger.store_at(siege.victim, stranger.store_request(rows))

            async def forge(number: int) -> Any:
                return await stranger.store_at(siege.victim, forged[number % 2])

            async def flood(number: int) -> Any:
                question = dht_pb2.FindRequest(
                    keys=[number.to_bytes(20, "big")] * MAX_FIND_KEYS, peer=stranger.dht.info
                )
                return await stranger.find_at(siege.victim, question)

            await stranger.answer(find=lie)

            def is_enough() -> bool:
                return siege.sent > 200 and node.metric("talkoot_dht_messages_refused_total") > 0

            lags = await siege.lasts(stuff, forge, flood, is_enough=is_enough)
            siege.check()
            print("lag", lags.quantile(1.0), lags.quantile(0.99))
            await asyncio.to_thread(lags.check)

    loop.run(scenario(), 300)


def test_small_questions_get_no_flood_of_answers(loop: LoopThread, node: NodeVictim) -> None:
    async def scenario() -> None:
        async with siege_of(node) as siege:
            stranger, until = siege.stranger, time.time() + 300
            key = stranger.keys.expert(UID(0, (1, 1)))
            entries: Entries = {}
            for writer in new_identities(FORGED):
                body = records_pb2.Announcement(state=records_pb2.REPLICA_STATE_WITHDRAWN)
                payload = records_pb2.RecordPayload(key=key, expires_at=until, announcement=body)
                entries[writer.peer_id.to_bytes()] = Entry(packed(sign_record(writer, payload)), until)
            stored = await stranger.store_at(
                siege.victim, stranger.store_request([(key, b"", pack_entries(entries), until)])
            )
            assert list(stored.store_ok) == [True]
            question = stranger.store_request([(key, b"", b"", until)]).keys
            before = node.metric("talkoot_uploaded_bytes_total")

            async def ask(number: int) -> Any:
                return await stranger.find_at(siege.victim, dht_pb2.FindRequest(keys=question))

            rate = UPLOAD_MBIT * 1e6 / 8 / 4

            def is_enough() -> bool:
                had_its_share = siege.received_bytes > 0.3 * rate * 16
                return had_its_share and node.metric("talkoot_dht_values_withheld_total") > 0

            began = time.monotonic()
            lags = await siege.lasts(ask, is_enough=is_enough)
            siege.check()
            assert siege.answered > 100
            # The burst, the rate, and the nearest nodes that are sent with each answer.
            most = rate * (16 + time.monotonic() - began) + siege.answered * 500
            assert siege.received_bytes < most
            assert node.metric("talkoot_uploaded_bytes_total") - before >= siege.received_bytes * 0.9
            print("lag", lags.quantile(1.0), lags.quantile(0.99))
            await asyncio.to_thread(lags.check)

    loop.run(scenario(), 300)


def test_what_strangers_store_takes_the_memory_that_the_metric_says(
    loop: LoopThread, node: NodeVictim
) -> None:
    async def scenario() -> None:
        async with siege_of(node) as siege:
            stranger, until = siege.stranger, time.time() + 300
            keys, before = stranger.keys, node.rss_bytes
            stored_before = node.metric("talkoot_dht_stored_bytes")
            numbers = iter(range(10**9))

            async def fill(number: int) -> Any:
                names = [keys.prefix(0, (next(numbers), 7)) for _ in range(MAX_ITEMS // 2)]
                names += [f"other-{name}" for name in names]
                rows = [(name, packed(3), packed(name), until) for name in names]
                return await stranger.store_at(siege.victim, stranger.store_request(rows))

            def stored() -> float:
                return node.metric("talkoot_dht_stored_bytes") - stored_before

            lags = await siege.lasts(fill, is_enough=lambda: stored() > 2**19)
            siege.check()
            print("lag", lags.quantile(1.0), lags.quantile(0.99))
            await asyncio.to_thread(lags.check)
            assert stored() < 64 * 2**20
            assert node.rss_bytes - before < 1.2 * stored() + 30 * 2**20

    loop.run(scenario(), 300)


def record_of_many_bodies(writer: Identity, key: str, until: float) -> bytes:
    """A record with thousands of bodies, of which the last one counts. protobuf keeps all of them."""
    payload = records_pb2.RecordPayload(key=key, expires_at=until)
    node = records_pb2.RecordPayload(node=records_pb2.NodeRecord())
    trainer = records_pb2.RecordPayload(trainer=records_pb2.TrainerRecord())
    bodies = node.SerializeToString() + trainer.SerializeToString()
    data = payload.SerializeToString() + BODIES * bodies
    record = records_pb2.SignedRecord(
        payload=data, public_key=writer.public_key, signature=writer.sign(writer.public_key + data)
    )
    return record.SerializeToString()


def test_records_of_very_many_parts_take_no_memory_once_they_were_checked(
    loop: LoopThread, node: NodeVictim
) -> None:
    async def scenario() -> None:
        async with Stranger.joined(node.invite) as stranger:
            subkey = packed(stranger.peer_id.to_bytes())
            until, before = time.time() + 300, node.rss_bytes
            for _ in range(BATCHES):
                until += 0.001  # each record replaces the one before it
                entries = []
                for number in range(7):
                    key = stranger.keys.prefix(0, (number,))
                    record = record_of_many_bodies(stranger.identity, key, until)
                    entries.append((key, subkey, packed(record), until))
                answer = await stranger.store_at(stranger.keys.author, stranger.store_request(entries))
                assert list(answer.store_ok) == [True] * 7
            grown = node.rss_bytes - before
            print(f"{7 * BATCHES} records of {len(record)} bytes: {grown / 2**20:.0f} MiB")
            assert grown < 40 * 2**20

    loop.run(scenario(), 300)
