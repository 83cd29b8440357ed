"""Each step of a layer uses one snapshot of the live experts, even on grids that are too large to know completely."""

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from expert_fakes import FakeSwarm, make_manifest, make_node, make_replica, virtual_time
from torch import Tensor, nn

from dht.announcements import NodeInfo, Replica
from dht.beam_search import Selection
from dht.directory import Directory, PrefixTables
from dht.regions import Prefix
from dht.uid import UID
from peer.codec import Floats
from peer.errors import UnreachableError
from peer.identity import PeerID
from trainer_client.balancing import balancing_loss, load_spread
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import ROUTERS, Routing
from trainer_client.settings import RouterName

HIDDEN = 8
LARGE = make_manifest((80, 80))
MANY_LAYERS = make_manifest((16, 16), layers=17)
"""More experts than a directory keeps in full, but few enough in a layer for `base` to balance."""


class SwarmRegistry:
    """The DHT of a swarm in which every expert is served."""

    def __init__(self, swarm: FakeSwarm) -> None:
        self.registry = self
        self._swarm = swarm
        self.answers = True

    async def prefixes(
        self, prefixes: Collection[Prefix], size: int, **_: Any
    ) -> dict[Prefix, frozenset[int]]:
        if not self.answers:
            raise UnreachableError("no DHT peer answered")
        return {prefix: frozenset(range(size)) for prefix in prefixes}

    async def replicas(self, uids: Collection[UID], **_: Any) -> dict[UID, tuple[Replica, ...]]:
        return {uid: (make_replica(uid, self._swarm.peer_of[uid]),) for uid in uids}

    def read_ahead(self, uids: Collection[UID]) -> None: ...

    async def nodes(self, peer_ids: Collection[PeerID], **limits: object) -> dict[PeerID, NodeInfo]:
        return {peer_id: make_node(peer_id) for peer_id in peer_ids}


class Watched:
    """A mixture of a large swarm, and the tables and choices of each of its steps."""

    def __init__(
        self, mixture: RemoteMixtureOfExperts, directory: Directory, registry: SwarmRegistry
    ) -> None:
        self.mixture = mixture
        self.directory = directory
        self.registry = registry
        self.selections: list[Selection] = []
        self.tables: list[tuple[str, PrefixTables]] = []
        router = mixture._router

        def choose(
            scores: Sequence[Floats], alive: PrefixTables, k: int, *others: Any, **named: Any
        ) -> Selection:
            self.tables.append(("choice", alive))
            self.selections.append(router.choose(scores, alive, k, *others, **named))
            return self.selections[-1]

        def weigh(scores: Sequence[Tensor], alive: PrefixTables, *others: Any) -> Tensor:
            self.tables.append(("weights", alive))
            return router.weigh(scores, alive, *others)

        mixture._router = replace(router, choose=choose, weigh=weigh)

    def note_balance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, function in (("balancing_loss", balancing_loss), ("load_spread", load_spread)):

            def noted(*arguments: Any, name: str = name, function: Any = function) -> Any:
                self.tables.append((name, arguments[-1]))
                return function(*arguments)

            monkeypatch.setattr(f"trainer_client.moe.{name}", noted)


@contextmanager
def watched(swarm: FakeSwarm, name: RouterName, seed: int = 0) -> Iterator[Watched]:
    manifest = swarm.manifest
    registry: Any = SwarmRegistry(swarm)
    with virtual_time() as runner:
        directory = Directory(registry, manifest, refresh_every_s=60, rng=random.Random(1))
        assert not directory.knows_all
        dispatcher = Dispatcher(directory, swarm, WaitPolicy(10.0, 0.0, 1), clock=runner.get_loop().time)
        torch.default_generator.manual_seed(seed)
        routing = Routing(name, ROUTERS[name].k or 3, seed=seed)
        mixture = RemoteMixtureOfExperts(0, manifest, dispatcher, runner.run, routing)
        nn.init.normal_(mixture.gate.linear.weight, std=0.5)
        yield Watched(mixture, directory, registry)
        runner.run(dispatcher.close())


def random_input(seed: int, sequences: int = 4, length: int = 8) -> Tensor:
    return torch.randn(sequences, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def sent_to(swarm: FakeSwarm) -> set[tuple[int, tuple[int, ...]]]:
    """Which rows were sent to which experts."""
    return {
        (row, part.uid.coordinate)
        for call in swarm.called("forward")
        for part in call.batch.parts()
        for row in call.batch.rows[part.places].tolist()
    }


def chosen_in(selection: Selection) -> set[tuple[int, tuple[int, ...]]]:
    rows, slots = np.nonzero(selection.valid)
    experts = map(tuple, selection.coordinates[rows, slots].tolist())
    return set(zip(rows.tolist(), experts, strict=True))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("name", ["product-key", "noisy-top-k", "switch", "base", "glam"])
def test_on_a_large_grid_what_the_router_chose_is_what_is_sent(name: RouterName, seed: int) -> None:
    swarm = FakeSwarm(MANY_LAYERS if name == "base" else LARGE, peers=5)
    with watched(swarm, name, seed) as step:
        step.mixture(random_input(seed))
    (selection,) = step.selections
    assert sent_to(swarm) == chosen_in(selection)
    if name == "noisy-top-k":
        assert 0 < (~selection.valid[:, 1]).sum() < len(selection.valid), (
            "chance left some second experts out"
        )


def test_on_a_large_grid_base_gives_each_expert_that_it_knows_as_many_rows() -> None:
    swarm = FakeSwarm(MANY_LAYERS, peers=5)
    with watched(swarm, "base") as step:
        step.mixture(random_input(0))
    live = int(step.tables[0][1][-1].sum())
    rows = [swarm.rows_sent("forward", uid) for uid in swarm.manifest.uids()]
    assert sum(rows) == 32
    assert max(rows) == -(-32 // live)


@pytest.mark.parametrize("name", ["noisy-top-k", "switch", "glam"])
def test_choice_balance_spread_and_weights_come_from_one_snapshot(
    name: RouterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = FakeSwarm(LARGE, peers=5)
    with watched(swarm, name) as step:
        step.note_balance(monkeypatch)
        for seed in range(2):  # the first search finds a swarm of which nothing was known
            step.selections.clear()
            step.tables.clear()
            step.mixture(random_input(seed))
            (selection,), (_, first) = step.selections, step.tables[0]
            assert [what for what, _ in step.tables] == ["choice", "balancing_loss", "load_spread", "weights"]
            assert all(tables is first for _, tables in step.tables)
            chosen = selection.coordinates[selection.valid]
            assert first[-1][tuple(chosen.T)].all()
            assert step.mixture.routed is not None
            assert step.mixture.routed.spread is not None


def test_a_refresh_between_choice_and_weights_changes_neither() -> None:
    """A step has its own snapshot. What is read from the swarm meanwhile is for the next step."""
    swarm = FakeSwarm(make_manifest((6,)))
    directory = swarm.directory()

    class Refreshing(FakeSwarm):
        async def call(self, call: Any) -> Any:
            directory.view = swarm.directory([UID(0, (5,))]).view
            async for answer in super().call(call):
                yield answer

    with virtual_time() as runner:
        clock = runner.get_loop().time
        dispatcher = Dispatcher(directory, Refreshing(swarm.manifest), WaitPolicy(10.0, 0.0, 1), clock=clock)
        routing = Routing("switch", k=1, expert_dropout=0.0)
        mixture = RemoteMixtureOfExperts(0, swarm.manifest, dispatcher, runner.run, routing)
        step = Watched(mixture, directory, SwarmRegistry(swarm))
        mixture(random_input(0))
        mixture(random_input(1))
        runner.run(dispatcher.close())
    assert [int(tables[-1].sum()) for _, tables in step.tables] == [6, 6, 1, 1]


def test_when_the_search_fails_what_is_known_must_do() -> None:
    swarm = FakeSwarm(LARGE, peers=5)
    with watched(swarm, "product-key") as step:
        step.mixture(random_input(0))
        known = {uid for call in swarm.calls for uid in call.uids}
        swarm.calls.clear()
        step.registry.answers = False
        step.directory._indices.clear()  # so that prefixes must be read again
        x = random_input(1)
        y = step.mixture(x)
    assert {uid for call in swarm.calls for uid in call.uids} <= known
    assert sent_to(swarm) == chosen_in(step.selections[-1])
    assert not torch.isclose(y, x).all(dim=-1).any()


def test_a_search_that_fails_with_nothing_known_leaves_the_input() -> None:
    swarm = FakeSwarm(LARGE, peers=5)
    with watched(swarm, "noisy-top-k") as step:
        step.registry.answers = False
        x = random_input(0)
        assert torch.equal(step.mixture(x), x)
        assert step.mixture.routed is not None
        assert step.mixture.routed.spread is None
    assert not swarm.calls
