"""Takes states from other nodes: the medoid of those that up to three hosts give, not the one that claims most
updates.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median_low

from dht.announcements import NodeInfo, Replica
from dht.manifest import Manifest
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.blocks import build_block
from expert_server.experts.expert import Expert
from expert_server.experts.format import (
    ACCUMULATED,
    BLOCK,
    OPTIMIZER,
    Checkpoint,
    State,
    block_tensors,
)
from expert_server.experts.plausibility import Scale, require_plausible
from expert_server.serving.runtime import Runtime
from expert_server.state.transfer import StateClient
from peer.errors import StateError, TransferError
from peer.identity import PeerID
from peer.loop import first_few
from peer.medoid import COMPARED, elementwise_median, medoid

logger: logging.Logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""How much longer to wait for the other hosts once one has given its state. A slow uplink sends a state of 7 MB in a
minute.
"""
_AT_ONCE = 2
"""Experts whose states are compared at the same time, each with up to three states in memory."""


@dataclass(frozen=True, eq=False)
class TakenState:
    """The state from which an expert continues."""

    peer_id: PeerID
    """The peer whose parameters they are."""
    update_count: int


class WholeStates:
    """Fetches states from several hosts of an expert, and gives the expert the one that is nearest to the others."""

    def __init__(self, swarm: Swarm, runtime: Runtime, states: StateClient, rng: random.Random) -> None:
        self._swarm = swarm
        self._runtime = runtime
        self._states = states
        self._rng = rng
        self._comparing = asyncio.Semaphore(_AT_ONCE)

    async def take(
        self,
        expert: Expert,
        hosts: Sequence[Replica],
        cap: Callable[[int], int],
        unreachable: set[PeerID],
        fetched: Mapping[PeerID, Checkpoint],
    ) -> TakenState | None:
        """Takes one of the states of the first three `hosts` that send a good one. Updates that the expert takes
        meanwhile are lost with the rest of its state. If anything else changes it, nothing is taken. `cap`: limits a
        claimed update count to what is believed. The resulting count is the lower median of the claims. Hosts in
        `unreachable` are not asked, and those that do not answer, or stall, are added. Hosts that kept this node
        waiting for nothing lately are asked only if there are no others. `fetched`: states that hosts have sent
        already. Returns None if nothing was taken. Raises UnreachableError.
        """
        peers = {replica.peer_id for replica in hosts} - unreachable
        nodes = await self._swarm.registry.nodes(peers) if peers else {}
        able = [nodes[replica.peer_id] for replica in hosts if replica.peer_id in nodes]
        able = [node for node in able if not self._states.is_withholding(node.peer_id)] or able
        async with self._comparing if len(able) > 1 else nullcontext():
            given = await _given(expert.uid, able, partial(self._fetch, expert, cap, fetched), unreachable)
            return await self._import(expert, given) if given else None

    async def _fetch(
        self,
        expert: Expert,
        cap: Callable[[int], int],
        fetched: Mapping[PeerID, Checkpoint],
        node: NodeInfo,
    ) -> Checkpoint:
        given = fetched.get(node.peer_id) or (await self._states.fetch(node, expert.uid)).checkpoint
        checkpoint = Checkpoint(given.state, cap(given.update_count))
        await self._runtime.run(partial(expert.require_good, checkpoint.state, checkpoint.update_count))
        return checkpoint

    async def _import(self, expert: Expert, given: Sequence[tuple[PeerID, Checkpoint]]) -> TakenState | None:
        states = [checkpoint for _, checkpoint in given]
        try:
            known, generation = await self._runtime.run(lambda: (expert.checkpoint(), expert.generation))
            index, chosen = await asyncio.to_thread(choose, states, known, self._rng)
            peer_id = given[index][0]
            is_taken = await self._runtime.run(
                partial(_replace, expert, chosen, peer_id.to_base58(), generation)
            )
        except StateError as error:
            logger.warning("refused all states of expert %s: %s", expert.uid, error)
            return None
        return TakenState(peer_id, chosen.update_count) if is_taken else None


class WholeParameters:
    """Fetches the parameters of experts, for a peer that hosts none, by the same rules as `WholeStates`."""

    def __init__(self, manifest: Manifest, states: StateClient, rng: random.Random) -> None:
        self._manifest = manifest
        self._states = states
        self._rng = rng
        # one at a time: initial parameters are drawn from torch's global generator
        self._checking = ThreadPoolExecutor(1, "check of parameters")

    async def fetch(
        self, uid: UID, nodes: Sequence[NodeInfo], cap: Callable[[int], int], unreachable: set[PeerID]
    ) -> tuple[PeerID, Checkpoint] | None:
        """The parameters from one of the first three `nodes` that give good ones, and that node.

        `cap` and `unreachable`: as in `WholeStates.take`. Returns None if no node gave any.
        """
        loop = asyncio.get_running_loop()
        first = await loop.run_in_executor(self._checking, build_block, self._manifest, uid)
        scale = Scale.of(dict(first.named_parameters()))

        async def fetch(node: NodeInfo) -> Checkpoint:
            fetched = (await self._states.fetch(node, uid, parameters=True)).checkpoint
            checkpoint = Checkpoint(fetched.state, cap(fetched.update_count))
            await asyncio.to_thread(self._require_plausible, uid, checkpoint, scale)
            return checkpoint

        given = await _given(uid, nodes, fetch, unreachable)
        if not given:
            return None
        known = Checkpoint({BLOCK + name: tensor for name, tensor in block_tensors(first).items()}, 0)
        states = [checkpoint for _, checkpoint in given]
        index, chosen = await asyncio.to_thread(choose, states, known, self._rng)
        return given[index][0], chosen

    def close(self) -> None:
        self._checking.shutdown(wait=False, cancel_futures=True)

    def _require_plausible(self, uid: UID, checkpoint: Checkpoint, first: Scale) -> None:
        require_plausible(uid, checkpoint.state, checkpoint.update_count, [first], self._manifest.optimizer)


async def _given(
    uid: UID,
    nodes: Sequence[NodeInfo],
    fetch: Callable[[NodeInfo], Awaitable[Checkpoint]],
    unreachable: set[PeerID],
) -> list[tuple[PeerID, Checkpoint]]:
    """The states of the first three nodes that give good ones.

    `fetch` raises TransferError or StateError. Nodes in `unreachable` are not asked, and those that do not answer, or
    stall, are added.
    """
    silent = set[PeerID]()
    """Nodes that were asked and have not answered."""

    async def ask(node: NodeInfo) -> tuple[PeerID, Checkpoint] | None:
        silent.add(node.peer_id)
        try:
            checkpoint = await fetch(node)
        except TransferError as error:
            logger.info("%s", error)
            if error.answered:
                silent.discard(node.peer_id)
            return None
        except StateError as error:
            logger.warning("refused the state of %s by %s: %s", uid, node.peer_id, error)
            silent.discard(node.peer_id)
            return None
        silent.discard(node.peer_id)
        return node.peer_id, checkpoint

    asked = (ask(node) for node in nodes if node.peer_id not in unreachable)
    given = await first_few(asked, COMPARED, _PATIENCE_S)
    unreachable |= silent
    return given


def choose(states: Sequence[Checkpoint], known: Checkpoint, rng: random.Random) -> tuple[int, Checkpoint]:
    """The index of the state whose parameters are taken, and the state from which the expert continues. Pure.

    `states`: one to three, all good. `known`: this node's own state, from a checkpoint or the initial parameters.

    A single state is taken as it is. Of several, only the chosen one's parameters are taken. Moments are the
    elementwise median, with those of `known` if there are only two states. Otherwise a peer could copy an honest
    state's parameters and add harmful moments.
    """
    if len(states) == 1:
        return 0, states[0]
    index = medoid([_tensors(state, BLOCK) for state in states], _tensors(known, BLOCK), rng)
    voices = states if len(states) == COMPARED else [*states, known]
    moments = [_tensors(voice, OPTIMIZER) for voice in voices]
    common = {name for each in moments for name in each if sum(name in other for other in moments) >= 2}
    state = {name: t for name, t in states[index].state.items() if name.startswith(BLOCK)}
    state |= {name: t for name, t in known.state.items() if name.startswith(ACCUMULATED)}
    state |= elementwise_median(moments, sorted(common))
    count = median_low([checkpoint.update_count for checkpoint in states])
    return index, Checkpoint(state, max(count, int(bool(common))))


def _tensors(checkpoint: Checkpoint, kind: str) -> State:
    return {n: t for n, t in checkpoint.state.items() if n.startswith(kind) and t.is_floating_point()}


def _replace(expert: Expert, chosen: Checkpoint, source: str, generation: object) -> bool:
    """Replaces the expert's state. Returns False, and changes nothing, if anything but updates has changed it since
    that generation. Raises StateError.
    """
    if expert.generation != generation:
        return False
    expert.import_state(chosen.state, chosen.update_count, source)
    return True
