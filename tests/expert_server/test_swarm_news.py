"""What a node's owner is told about the rest of the swarm."""

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from simulated_readings import manifest, node, peer, replica, trainer

from dht.announcements import NodeInfo, Replica, ReplicaState, TrainerInfo
from dht.memory import MemoryID, ShardInfo
from dht.uid import UID
from expert_server.memory.placement import SeenShard, ShardKey
from expert_server.swarm_news import TRAINERS_EVERY_S, SwarmNews, TrainingNews
from peer.errors import UnreachableError
from peer.identity import PeerID

HERE, THERE, *_ = manifest().uids()


@dataclass
class Records:
    """The records in a DHT."""

    peer_id: PeerID = field(default_factory=lambda: peer(0))
    known: dict[PeerID, NodeInfo] = field(default_factory=dict)
    training: dict[PeerID, TrainerInfo] = field(default_factory=dict)
    spent_bytes: int = 0

    out: dict[PeerID, str] = field(default_factory=dict)

    def why_out(self, peer_id: PeerID) -> str:
        return self.out.get(peer_id, "")

    async def nodes(self, peers: Collection[PeerID], *, with_left: bool = False) -> dict[PeerID, NodeInfo]:
        return {p: self.known[p] for p in peers if p in self.known and (with_left or not self.known[p].left)}

    async def some_trainer_ids(self, enough: int) -> tuple[frozenset[PeerID], int]:
        return frozenset(self.training), len(self.training)

    async def trainers(
        self, peers: Collection[PeerID], *, with_left: bool = False
    ) -> dict[PeerID, TrainerInfo]:
        return {
            p: self.training[p]
            for p in peers
            if p in self.training and (with_left or not self.training[p].left)
        }


Shards = dict[ShardKey, SeenShard]


def news_of(
    records: Records,
    seen: dict[UID, tuple[Replica, ...]],
    users: int,
    shards: Callable[[], Shards] = dict,
) -> SwarmNews:
    registry: Any = records
    return SwarmNews(registry, lambda: seen, shards, lambda: users, trainers_every_s=0.0, clock=lambda: 7.0)


def served(**hosts: int) -> Shards:
    """Shards in regions of a memory. `hosts`: the number of the only host of each; 0: it has none."""
    memory, shards = MemoryID.of("notes", peer(9)), Shards()
    for region, host in hosts.items():
        info = ShardInfo((0,), region.encode() * 32, 1, 100)
        serving = frozenset([peer(host)] if host else [])
        shards[ShardKey(memory, info.root)] = SeenShard(info, ord(region), serving, frozenset())
    return shards


@pytest.mark.parametrize(
    ("users", "said"),
    [
        (0, "this node goes on"),
        (1, "1 trainer used this node in the last minute"),
        (2, "2 trainers used this node in the last minute"),
    ],
)
def test_a_host_that_dies_is_named_with_who_still_uses_this_node(
    caplog: pytest.LogCaptureFixture, users: int, said: str
) -> None:
    caplog.set_level(logging.INFO)
    records = Records(known={peer(1): node(1, left=True), peer(3): node(3)})
    seen: dict[UID, tuple[Replica, ...]] = {HERE: tuple(replica(HERE, number) for number in range(4))}
    news = news_of(records, seen, users)

    async def looks() -> None:
        await news.look()
        assert not caplog.messages
        seen.clear()  # one said goodbye, one died, and one hosts nothing any more
        await news.look()
        await news.look()

    asyncio.run(looks())
    assert caplog.messages == [f"node {peer(2).to_base58()[-8:]} has gone; {said}"]


def test_a_host_that_dies_is_called_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    records = Records(known={peer(1): node(1, name="Benno")})
    seen: dict[UID, tuple[Replica, ...]] = {HERE: (replica(HERE, 1),)}
    news = news_of(records, seen, 0)

    async def looks() -> None:
        await news.look()
        seen.clear()
        records.known.clear()
        await news.look()

    asyncio.run(looks())
    assert caplog.messages == [f"node Benno ({peer(1).to_base58()[-8:]}) has gone; this node goes on"]


def test_a_host_that_the_swarm_no_longer_admits_is_named_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    seen: dict[UID, tuple[Replica, ...]] = {HERE: (replica(HERE, 1), replica(HERE, 2))}
    news = news_of(Records(out={peer(1): "was revoked", peer(2): "has expired"}), seen, 1)

    asyncio.run(news.look())
    seen.clear()
    asyncio.run(news.look())
    names = [peer(number).to_base58()[-8:] for number in (1, 2)]
    assert sorted(caplog.messages) == sorted(
        f"node {name}, whose invite {what}, has left; 1 trainer used this node in the last minute"
        for name, what in zip(names, ("was revoked", "has expired"), strict=True)
    )


LIVES, RENEWED, LEFT = node(1), node(1, expires_at=node(1).expires_at + 10), node(1, left=True)


@pytest.mark.parametrize(
    ("looks", "reported"),
    [
        pytest.param([(served(a=1), LIVES), (served(a=0), None), (served(a=0), None)], [0, 1, 1], id="dies"),
        pytest.param(
            [(served(a=1), LIVES), (served(a=0), LEFT), (served(a=0), None)], [0, 0, 0], id="leaves"
        ),
        pytest.param(
            [(served(a=1), LIVES), (served(b=2), None)], [0, 0], id="in a region that is not read again"
        ),
        pytest.param([(served(a=1), LIVES), (served(a=0, b=1), None)], [0, 0], id="hosts other regions"),
        pytest.param(
            [(served(a=1), LIVES), (served(a=0), LIVES), (served(b=0), LIVES), (served(b=0), None)],
            [0, 0, 0, 1],
            id="dies, and its record lasts longer",
        ),
        pytest.param(
            [(served(a=1), LIVES), (served(a=0), LIVES), (served(a=0), RENEWED), (served(a=0), None)],
            [0, 0, 0, 0],
            id="drops a shard",
        ),
    ],
)
def test_a_host_of_passages_that_dies_is_reported_once(
    caplog: pytest.LogCaptureFixture, looks: list[tuple[Shards, NodeInfo | None]], reported: list[int]
) -> None:
    caplog.set_level(logging.INFO)
    records, shards = Records(), Shards()
    news = news_of(records, {}, 0, lambda: shards)
    found = []
    for shards, record in looks:  # noqa: B007  # the function above returns them
        records.known = {} if record is None else {peer(1): record}
        asyncio.run(news.look())
        found.append(len(caplog.messages))
    assert found == reported
    assert set(caplog.messages) <= {f"node {peer(1).to_base58()[-8:]} has gone; this node goes on"}


def test_a_host_of_experts_and_passages_that_dies_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    seen: dict[UID, tuple[Replica, ...]] = {HERE: (replica(HERE, 1),)}
    shards = served(a=1)
    news = news_of(Records(), seen, 0, lambda: shards)
    asyncio.run(news.look())
    seen.clear()
    asyncio.run(news.look())
    assert len(caplog.messages) == 1
    shards = served(a=0)
    asyncio.run(news.look())
    assert len(caplog.messages) == 1


def test_a_replica_that_does_not_serve_yet_is_missed_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    seen: dict[UID, tuple[Replica, ...]] = {THERE: (replica(THERE, 1, state=ReplicaState.CLAIMED),)}
    news = news_of(Records(), seen, 0)

    asyncio.run(news.look())
    seen.clear()
    asyncio.run(news.look())
    assert not caplog.messages


def test_the_models_loss_is_told_beside_the_first_that_was_heard_of() -> None:
    records = Records()
    news = news_of(records, {}, 0)

    async def looks() -> list[TrainingNews]:
        found = []
        for trainers in ([], [(0, None)], [(0, 4.0), (1, 4.5)], [(1, 3.0)], []):
            records.training = {
                peer(1_000_000 + number): trainer(number, validation_loss=loss) for number, loss in trainers
            }
            await news.look()
            found.append(news.training)
        return found

    assert asyncio.run(looks()) == [
        TrainingNews(0),
        TrainingNews(1),
        TrainingNews(2, 4.0, 4.0, 7.0),
        TrainingNews(1, 3.0, 4.0, 7.0),
        TrainingNews(0, 3.0, 4.0, 7.0),
    ]


def test_the_last_loss_of_a_trainer_that_has_left_is_heard_and_grows_old() -> None:
    now, records = [1000.0], Records()
    registry: Any = records
    news = SwarmNews(registry, dict, dict, lambda: 0, clock=lambda: now[0])
    records.training = {peer(1_000_000): trainer(0, validation_loss=3.5, left=True)}
    asyncio.run(news.look())
    assert (news.training.trainers, news.training.loss, news.loss_age) == (0, 3.5, "")
    records.training.clear()
    for seconds, said in ((119.0, ""), (1.0, "2 min"), (600.0, "12 min")):
        now[0] += seconds
        asyncio.run(news.look())
        assert news.loss_age == said


def test_of_many_trainers_some_are_read_and_all_counted() -> None:
    read: list[int] = []

    class Counting(Records):
        async def trainers(
            self, peers: Collection[PeerID], *, with_left: bool = False
        ) -> dict[PeerID, TrainerInfo]:
            read.append(len(peers))
            return await super().trainers(peers, with_left=with_left)

    records = Counting(training={peer(1_000_000 + n): trainer(n) for n in range(100)})
    news = news_of(records, {}, 0)
    asyncio.run(news.look())
    assert (news.training.trainers, read) == (100, [8])


def test_listed_trainers_that_do_not_exist_are_not_counted() -> None:
    class Filled(Records):
        async def some_trainer_ids(self, enough: int) -> tuple[frozenset[PeerID], int]:
            return frozenset(map(peer, range(2000))), 13_000_000

    news = news_of(Filled(), {}, 0)
    asyncio.run(news.look())
    assert news.training.trainers == 0


def test_trainers_are_looked_up_now_and_then_and_again_after_a_look_that_failed() -> None:
    now, asked, fails = [1000.0], [0], [True]

    class Failing(Records):
        async def some_trainer_ids(self, enough: int) -> tuple[frozenset[PeerID], int]:
            asked[0] += 1
            if fails[0]:
                raise UnreachableError("nobody answers")
            return await super().some_trainer_ids(enough)

    registry: Any = Failing()
    news = SwarmNews(registry, dict, dict, lambda: 0, clock=lambda: now[0])

    async def looks() -> None:
        with pytest.raises(UnreachableError):
            await news.look()
        fails[0] = False
        for seconds in (0.0, 10.0, TRAINERS_EVERY_S - 10.1, 0.1, 10.0):
            now[0] += seconds
            await news.look()

    asyncio.run(looks())
    assert asked[0] == 3


@pytest.mark.parametrize(("cost", "pause_s"), [(500, 60), (65_000, 650), (10**9, 1800)])
def test_the_more_a_look_at_the_trainers_costs_the_later_the_next_one_is(cost: int, pause_s: float) -> None:
    now, asked = [1000.0], [0]

    class Costly(Records):
        async def some_trainer_ids(self, enough: int) -> tuple[frozenset[PeerID], int]:
            asked[0] += 1
            self.spent_bytes += cost
            return await super().some_trainer_ids(enough)

    registry: Any = Costly()
    news = SwarmNews(registry, dict, dict, lambda: 0, clock=lambda: now[0])

    async def looks() -> None:
        await news.look()
        now[0] += pause_s - 1
        await news.look()
        assert asked[0] == 1
        now[0] += 1
        await news.look()
        assert asked[0] == 2

    asyncio.run(looks())
