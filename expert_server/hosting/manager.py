"""Which experts a node hosts: it adopts orphans, adds or exchanges replicas, and hands its experts over when
it leaves.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter as Multiset
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, groupby
from typing import Any, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter

from dht.announcements import NodeInfo, Replica, ReplicaState, hosts_of
from dht.swarm import Swarm, some_nodes
from dht.uid import UID
from expert_server.hosting.placement import (
    ExchangeHysteresis,
    HostingSurvey,
    answering,
    assign_orphans,
    exchange,
    further_replica,
    keener,
    lasting_replicas,
    rank_vacancies,
    regressed,
    releasable,
    serving_elsewhere,
    under_replicated,
    usual_updates,
    vacant,
)
from expert_server.hosting.replicas import LocalReplicas
from expert_server.settings import NodeSettings
from expert_server.state.servicer import MAX_UIDS_IN_ASK
from peer import clock
from peer.errors import UnreachableError
from peer.formatting import counted
from peer.identity import PeerID
from peer.loop import Step, TaskSet, cancel_all, first_of, side_by_side, tolerating
from peer.wire import state_pb2

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

_CLAIM_ROUNDS = 5
"""How many times a starting node looks for experts, as long as others may still lose their claims."""
LOOKS_PER_PERIOD = 4
"""The first reads what the swarm lacks, and the others only experts that it found without a host."""
_LOOKS = 2
"""How many looks in a row must find an expert vacant before it is adopted."""
_LOOKS_WITHOUT = 5
"""The same if the expert was hosted before and this node has no checkpoint of it, and so would have to restart it. All
nodes look at least once in this time, so nodes with a checkpoint usually come first. One that comes later takes the
expert back.
"""
_SUSPECTS = 8
"""How many of the vacant experts a look reads again that an earlier look has found, however it found them."""
_FIRM_LOOKS = 4
"""How many whole looks in a row must find that the same replica can be spared. There is one in a period, and
announcements live for at most three.
"""
_EXCHANGE_EVERY_S = 600.0
"""The shortest time between two exchanges."""
_MOST_PROOFS, _PROOFS_AT_ONCE = 16, 4
"""Experts that one look can give up, and states that are fetched at the same time to prove them."""
_PROOFS_S = 20.0
"""The longest time for all proofs of one look."""
_AVERAGE_WITHIN_S = 2.0
"""After this time, a leaving node waits no longer for averages with hosts to which calls have failed."""
_ANSWER_WITHIN_S = 2.0
"""If a node does not answer a request to adopt experts within this time, others are asked, too."""
_CLAIM_WITHIN_S = 10.0
"""A node that has accepted an expert must claim it within this time. Otherwise it is skipped: it may be leaving too."""
_FIRST_PAUSE_S, _PAUSE_GROWTH, _LONGEST_PAUSE_S = 0.2, 1.25, 2.0
"""The pauses after which a leaving node checks whether others serve its experts, and asks those again that refused: the
first one, by which factor they grow, and the longest. Each check reads tens of KB in a large swarm.
"""
_ASKS = 3
"""How many times a node that refuses, or fails to adopt, is asked: strangers may keep it busy."""
_TRIES = 3
"""How many times it tries to read more nodes than the first ones."""
_HEIRS, _MOST_HEIRS = 64, 512
"""How many other nodes a leaving node reads first, to ask them to adopt its experts, and how many if they don't take
all.
"""


AverageLast: TypeAlias = Callable[[Mapping[UID, Sequence[Replica]], set[PeerID]], Coroutine[Any, Any, None]]
"""Averages experts that are given up with others' replicas of them, and records which peers do not answer."""


@dataclass
class _Asked:
    """An expert that a node was asked to adopt."""

    heir: PeerID
    until: float
    """Until when the node may take to answer, or to claim the expert."""
    has_claimed: bool = False


class Handover:
    """One departure: averages the experts that others serve too a last time, and asks nodes with room to adopt those
    that nobody else serves, until the DHT shows that they serve them. Both happen at the same time, because peers that
    do not answer may hold up either.
    """

    def __init__(
        self,
        swarm: Swarm,
        replicas: LocalReplicas,
        average: AverageLast | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`average`: averages experts with others' replicas; None: they are given up without that."""
        self.alone: set[UID] = set(replicas.experts)
        """The experts that nobody else serves, as far as this node has seen."""
        self.has_looked: bool = False
        """Whether the DHT has said who else serves the experts."""
        self.handed_over: int = 0
        self._swarm = swarm
        self._replicas = replicas
        self._average = average
        self._clock = clock
        self._nodes: dict[PeerID, NodeInfo] = {}
        self._rooms: dict[PeerID, int] = {}
        self._has_read_all = False
        """Whether it has read as many other nodes as it may."""
        self._failed_reads = 0
        self._reading = asyncio.Lock()
        self._silent: set[PeerID] = set()
        """Hosts that are announced and did not answer. They may have died, and do not count."""
        self._asked: dict[UID, _Asked] = {}
        self._refusals: Multiset[PeerID] = Multiset()

    async def run(self) -> None:
        """Returns when others serve all of the experts, or nobody is left to ask. Experts that others serve are
        withdrawn.

        Raises UnreachableError if the DHT does not answer at first. Later, it is asked until it answers, so limit the
        time.
        """
        replicas = await self._swarm.experts.replicas(self.alone)
        self.has_looked = True
        shared = {uid: others for uid, hosts in replicas.items() if (others := self._serving(hosts))}
        logger.info(
            "gives up %s, of which other nodes serve %d too; nodes with room are asked to take the others",
            counted(len(self.alone), "expert"),
            len(shared),
        )
        self.alone.difference_update(shared)
        await side_by_side((self._share(shared), self._give_away({*self.alone})), 2)

    def _serving(self, hosts: Collection[Replica]) -> list[Replica]:
        others = serving_elsewhere(hosts, self._swarm.host.peer_id)
        return [replica for replica in others if replica.peer_id not in self._silent]

    async def _share(self, shared: Mapping[UID, Sequence[Replica]]) -> None:
        """Averages these experts, and leaves them to their other hosts. If these do not answer, the experts are given
        away: at once if the last calls to the hosts' DHT nodes failed, soon if they fail meanwhile, and otherwise after
        the averages, as a slow line may be busy.
        """
        if self._average is None:
            return await self._leave_to_others({*shared})
        has_failed, silent = self._swarm.host.has_failed, set[PeerID]()
        averaging = asyncio.create_task(self._average(shared, silent), name="average before leaving")
        # they may have died a short time ago: they are still announced
        dead = self._orphaned(shared, {*filter(has_failed, hosts_of(shared))})

        async def end() -> None:
            await asyncio.wait({averaging}, timeout=_AVERAGE_WITHIN_S)
            waiting = {uid: others for uid, others in shared.items() if uid not in dead}
            gone = self._orphaned(waiting, {*filter(has_failed, silent)})
            await side_by_side((leave(waiting.keys() - gone), self._give_away({*gone})), 2)

        async def leave(uids: Set[UID]) -> None:
            await averaging
            self._silent.update(silent)
            await self._leave_to_others({*uids})

        try:
            await side_by_side((end(), self._give_away({*dead})), 2)
        finally:
            await cancel_all([averaging])

    async def _leave_to_others(self, uids: set[UID]) -> None:
        """Withdraws those of the experts that another node still serves, and gives the others away. Their hosts may be
        leaving at the same moment. Each of them first announces that it leaves, and then reads who serves, so the last
        one to announce it sees that nobody else stays.
        """
        if not uids:
            return
        await self._insist(partial(self._replicas.offer, uids))
        replicas = await self._insist(partial(self._swarm.experts.replicas, uids))
        served = {uid for uid, hosts in replicas.items() if self._serving(hosts)}
        self.alone = (self.alone | uids) - served
        await side_by_side((self._withdraw(served), self._give_away(uids - served)), 2)

    def _orphaned(self, shared: Mapping[UID, Sequence[Replica]], silent: Collection[PeerID]) -> set[UID]:
        """The experts whose other hosts are all silent. These hosts don't count from now on."""
        self._silent.update(silent)
        orphans = {uid for uid, others in shared.items() if not self._serving(others)}
        self.alone.update(orphans)
        return orphans

    async def _insist(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Repeats a call until the DHT answers. It has answered before, and while other nodes adopt experts, a failure
        must not end that.
        """
        while True:
            with contextlib.suppress(UnreachableError):
                return await call()
            await asyncio.sleep(_FIRST_PAUSE_S)

    async def _withdraw(self, uids: Collection[UID]) -> None:
        with contextlib.suppress(UnreachableError):  # they are withdrawn again at the end
            await self._replicas.withdraw(uids)

    async def _give_away(self, uids: set[UID]) -> None:
        """Returns when other nodes serve these experts, or nobody is left to ask."""
        if not uids:
            return
        await asyncio.gather(
            self._insist(partial(self._replicas.offer, uids)), self._insist(self._read_rooms)
        )
        pause_s = _FIRST_PAUSE_S
        async with contextlib.aclosing(TaskSet()) as asking:
            while uids:
                self._ask(sorted(uids - self._asked.keys()), asking)
                if not asking and uids - self._asked.keys() and not self._has_read_all:
                    await self._read_rooms(more=True)
                    continue
                if not (asking or uids & self._asked.keys()):
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(_PAUSE_GROWTH * pause_s, _LONGEST_PAUSE_S)
                with contextlib.suppress(UnreachableError):  # it looks again soon
                    replicas = await self._swarm.experts.replicas(uids)
                    await self._note_served({uid for uid, hosts in replicas.items() if self._serving(hosts)})
                    uids &= self.alone
                    self._pass_over(replicas)

    async def _note_served(self, served: set[UID]) -> None:
        """Withdraws experts that another node serves by now."""
        self.alone -= served
        self.handed_over += len(served & self._asked.keys())
        if served:
            await self._withdraw(served)

    async def _read_rooms(self, more: bool = False) -> None:
        """Reads some other nodes; again, and as many as it may, only if `more` are needed. Raises UnreachableError, but
        not for these, which it tries to read a few times.
        """
        async with self._reading:
            if self._has_read_all or (self._nodes and not more):
                return
            try:
                nodes = await some_nodes(self._swarm, _MOST_HEIRS if more else _HEIRS)
            except UnreachableError:
                if not more:
                    raise
                self._failed_reads += 1
                self._has_read_all = self._failed_reads == _TRIES
                await asyncio.sleep(_FIRST_PAUSE_S)
                return
            self._has_read_all = more
            self._nodes = nodes | self._nodes
            self._rooms = {
                p: node.expert_capacity - node.expert_count for p, node in nodes.items()
            } | self._rooms

    def _ask(self, uids: Collection[UID], asking: TaskSet) -> None:
        """Asks all chosen nodes at once. Experts that they refuse are left for the next time, or for other nodes."""
        for heir, share in self._shares(uids):
            self._asked |= {uid: _Asked(heir, self._clock() + _ANSWER_WITHIN_S) for uid in share}
            self._rooms[heir] -= len(share)
            asking.spawn(self._ask_one(heir, share), "ask an heir")

    def _shares(self, uids: Collection[UID]) -> list[tuple[PeerID, list[UID]]]:
        """Chooses a node for each expert. Those that did not answer lately come last: they may have died."""
        rooms = {peer_id: room for peer_id, room in self._rooms.items() if peer_id not in self._silent}
        doubtful = {peer_id for peer_id in rooms if self._swarm.host.has_failed(peer_id)}
        found = assign_orphans(uids, {p: room for p, room in rooms.items() if p not in doubtful})
        left = [uid for uid in uids if uid not in found]
        found |= assign_orphans(left, {p: room for p, room in rooms.items() if p in doubtful})
        by_heir = groupby(sorted(found, key=lambda uid: (found[uid].to_bytes(), uid)), key=found.__getitem__)
        return [(heir, list(share)[:MAX_UIDS_IN_ASK]) for heir, share in by_heir]

    async def _ask_one(self, heir: PeerID, share: list[UID]) -> None:
        accepted = 0
        with tolerating("ask an heir"):  # the others are asked all the same
            accepted = await self._replicas.states.ask(self._nodes[heir], state_pb2.ASK_REASON_ADOPT, share)
        for uid in share[:accepted]:
            self._asked[uid] = _Asked(heir, self._clock() + _CLAIM_WITHIN_S)
        for uid in share[accepted:]:
            if uid in self._asked and self._asked[uid].heir == heir:
                del self._asked[uid]
        if accepted < len(share):
            self._note_refused(heir, len(share) - accepted)

    def _note_refused(self, heir: PeerID, count: int) -> None:
        """Notes that this node still has the room for so many experts, which it did not adopt."""
        self._refusals[heir] += 1
        self._rooms[heir] = 0 if self._refusals[heir] >= _ASKS else self._rooms[heir] + count

    def _pass_over(self, replicas: Mapping[UID, Collection[Replica]]) -> None:
        """Skips nodes that have not answered, or did not claim what they accepted. Those that claimed it and then gave
        it up are asked again: their adoption failed.
        """
        failed = Multiset[PeerID]()
        for uid in replicas.keys() & self._asked.keys():
            asked = self._asked[uid]
            if any(replica.peer_id == asked.heir for replica in replicas[uid]):
                asked.has_claimed = True
            elif self._clock() > asked.until:
                del self._asked[uid]
                if asked.has_claimed:
                    failed[asked.heir] += 1
                else:
                    self._rooms[asked.heir] = 0
        for heir, count in failed.items():
            self._note_refused(heir, count)


class HostingManager:
    """Decides which experts a node hosts. Looks happen one at a time; requests to adopt are handled at any time."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        replicas: LocalReplicas,
        now: Callable[[], float] = clock.now,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self.adopted: Counter = Counter(
            "talkoot_experts_adopted",
            "Experts taken over because nobody hosted them, or their only host left.",
            registry=metrics,
        )
        self.handed_over: Counter = Counter(
            "talkoot_experts_handed_over",
            "Experts that others took over when this node left.",
            registry=metrics,
        )
        self.replicated: int = 0
        """How many of the hosted experts other nodes served too at the last look."""
        self.offline: int | None = None
        """How many of the experts that it gave up last nobody else hosted then; None: not known."""
        self.exchanged: Counter = Counter(
            "talkoot_experts_exchanged",
            "Replicas given up for ones that were needed more.",
            registry=metrics,
        )
        self.seen: Mapping[UID, tuple[Replica, ...]] = {}
        """The replicas found at the last look."""
        self._swarm = swarm
        self._replicas = replicas
        self._now = now
        self._enough = settings.replicas
        self._room = settings.experts if settings.experts is not None else replicas.fitting()
        self._spare = settings.spare if settings.spare is not None else (self._room + 1) // 2
        self._vacant_looks: dict[UID, int] = {}
        """For each expert, how many looks in a row found no host."""
        self._hysteresis = ExchangeHysteresis(_FIRM_LOOKS, _EXCHANGE_EVERY_S)
        self._survey = HostingSurvey(swarm.experts, swarm.manifest, swarm.host.peer_id)
        self._hurried = asyncio.Event()
        self._changing = asyncio.Lock()
        """Held while this node looks for experts to take or give up, which takes long if states arrive slowly."""

    @property
    def capacity(self) -> int:
        """The most experts that it would host, including those it would adopt."""
        return self._room + self._spare

    @property
    def alone(self) -> list[UID]:
        """The experts in service that nobody else served at the last look."""
        me = self._swarm.host.peer_id
        mine = sorted(self._replicas.experts)
        return [uid for uid in mine if not serving_elsewhere(self.seen.get(uid, ()), me)]

    async def take_first(self) -> None:
        """Fills its room with experts that nobody hosts."""
        self._hurried.clear()
        self._replicas.open()
        for _ in range(_CLAIM_ROUNDS):
            async with self._changing:
                unserved = await self._take_vacant()
            if self._replicas.leaving or self._room <= len(self._replicas.experts) or not unserved:
                break
            await asyncio.sleep(self._replicas.claim_wait_s)  # others give up claims that they lost

    async def announce(self) -> None:
        """Renews the announcements of this node's replicas, and the manifest."""
        await self._replicas.announce()
        await self._swarm.keep_manifest()

    def looks(self) -> Iterator[Step]:
        """The looks of a node that runs, without end: `LOOKS_PER_PERIOD` in each period."""
        again = [self.look_again] * (LOOKS_PER_PERIOD - 1)
        return chain((self.replicate,), cycle((*again, self.look)))

    async def look(self) -> None:
        """Adopts experts that nobody hosts, and fills the remaining room with further replicas."""
        async with self._changing:
            mine, saved = {*self._replicas.experts}, await self._replicas.checkpoints.newest()
            gives = self._hysteresis.gives
            again = [*self._suspects()[:_SUSPECTS], *([] if gives is None else [gives])]
            replicas = await self._read(saved, again)
            self._require_own(mine & self._survey.just_read, replicas)
            self._vacant_looks = self._vacant_again(replicas, saved)
            await self._adopt(replicas, saved)
            await self._replicate(replicas, saved)
            await self._exchange(replicas)

    async def look_again(self) -> None:
        """Between two looks: reads the vacant experts again, and adopts those that are still vacant."""
        if not (suspects := {*self._suspects()}):
            return
        async with self._changing:
            own = {*[*self._replicas.experts][:1]}
            replicas = await self._swarm.experts.replicas(suspects | own)
            self._require_own(own, replicas)
            others = {uid: looks for uid, looks in self._vacant_looks.items() if uid not in suspects}
            saved = await self._replicas.checkpoints.newest()
            self._vacant_looks = others | self._vacant_again(replicas, saved)
            await self._adopt(replicas, saved)

    async def replicate(self) -> None:
        """Fills the remaining room with replicas of the experts that have the fewest."""
        async with self._changing:
            saved = await self._replicas.checkpoints.newest()
            await self._replicate(await self._read(saved), saved)

    async def adopt_from(self, leaving: PeerID, uids: Collection[UID]) -> None:
        """Takes those of the experts that this leaving peer offers in the DHT, and that fewer nodes serve than should.
        One that others serve may be on offer because they do not answer.
        """
        # runs beside a look: that peer waits at most ten seconds for an heir, and a look may take minutes
        replicas = await self._offered_by(leaving, uids)
        others = {
            uid: len(serving_elsewhere(hosts, self._swarm.host.peer_id)) for uid, hosts in replicas.items()
        }
        for count in sorted({*others.values()}):
            wanted = [uid for uid in others if others[uid] == count < max(1, self._enough)]
            if taken := await self._take(wanted, count + 1, replicas):
                self.adopted.inc(len(taken))
                logger.info(
                    "adopted %s of node %s, which leaves or pauses",
                    counted(len(taken), "expert"),
                    leaving.short,
                )

    async def _offered_by(self, leaving: PeerID, uids: Collection[UID]) -> dict[UID, tuple[Replica, ...]]:
        """The replicas of those experts that this peer offers, and that this node does not host."""
        replicas = await self._swarm.experts.replicas(uids)
        return {
            uid: hosts
            for uid, hosts in replicas.items()
            if uid not in self._replicas.experts
            and any(r.peer_id == leaving and r.state is ReplicaState.LEAVING for r in hosts)
        }

    async def release(self, timeout_s: float, average: AverageLast | None = None) -> int:
        """Gives up all experts, and waits at most `timeout_s` for others to adopt those that nobody else serves.

        `average`: averages the experts that others serve too with their replicas, meanwhile. Returns how many experts
        nobody else hosts now: they exist only in this node's checkpoints, if those could be written. `take_first`
        starts hosting again.
        """
        self._replicas.leave()
        async with self._changing:
            count = len(self._replicas.experts)
            await self._replicas.finish_work()
            handover = Handover(self._swarm, self._replicas, average)
            has_looked = bool(count and timeout_s) and await self._hand_over(handover, timeout_s)
            await self._replicas.release_all()
            self._vacant_looks.clear()
            self.replicated = 0
        alone = len(handover.alone)
        self.offline = alone if has_looked else None
        if count and not has_looked:
            logger.info("gave up %s, of which this node has checkpoints", counted(count, "expert"))
        elif count:
            logger.info(
                "gave up %s: others host %d, only this node's checkpoints have %d",
                *(counted(count, "expert"), count - alone, alone),
            )
        return alone

    def hurry(self) -> None:
        """Stops waiting for others to adopt this node's experts."""
        self._hurried.set()

    async def _hand_over(self, handover: Handover, timeout_s: float) -> bool:
        """Returns whether the DHT has said who else serves the experts, as far as that could be seen in time."""
        try:
            await first_of(handover.run(), self._hurried.wait(), asyncio.sleep(timeout_s))
            return handover.has_looked
        except UnreachableError as error:
            logger.warning("could not hand experts over: %s", error)
        except Exception:  # the experts must still be saved
            logger.exception("could not hand experts over")
        finally:
            self.handed_over.inc(handover.handed_over)
        return False

    def _suspects(self) -> list[UID]:
        """The vacant experts that once had a host; first those that it may soon adopt, and last those that it could
        have adopted.
        """
        looks = {uid: count for uid, count in self._vacant_looks.items() if self._survey.had_host(uid)}
        return sorted(looks, key=lambda uid: (looks[uid] < _LOOKS_WITHOUT, looks[uid]), reverse=True)

    async def _read(
        self, saved: Mapping[UID, int], again: Collection[UID] = ()
    ) -> Mapping[UID, tuple[Replica, ...]]:
        """Reads the replicas of the experts that may need this node. `saved`: the update counts of its checkpoints."""
        self.seen = await self._survey.read(self._replicas.experts, saved, again)
        return self.seen

    async def _adopt(self, replicas: Mapping[UID, Collection[Replica]], saved: Mapping[UID, int]) -> None:
        """Takes experts that had no host in several looks in a row: after the first look, they may just be changing
        hands. A node without a checkpoint waits for more looks, so that nodes with one come first. The spare room is
        only for experts that once had a host: the founder's node leaves the others to nodes that join.
        """
        me = self._swarm.host.peer_id
        had_host = {*self._suspects()}
        lasting = {
            uid
            for uid, looks in self._vacant_looks.items()
            if looks >= (_LOOKS_WITHOUT if uid in had_host and uid not in saved else _LOOKS)
        }
        orphans = lasting & (had_host | saved.keys())
        room = self._room - self._replicas.count
        gains = self._regressed_elsewhere(replicas, saved)
        lacking = len(orphans | gains.keys()) - room - self._spare
        if gone := await self._proven(releasable(replicas, self._replicas.experts, me, lacking), replicas, 1):
            await self._replicas.release(gone, self._vacant_looks.keys() | gains.keys())
            room += len(gone)
            logger.info(
                "gave up %s that others host too, for %s that nobody hosts or others had started anew",
                counted(len(gone), "expert"),
                counted(lacking, "other"),
            )
        wanted = rank_vacancies(orphans | gains.keys(), room + self._spare, me, {**saved, **gains})
        wanted += rank_vacancies(lasting - orphans, room - len(wanted), me, saved)
        if taken := await self._take(wanted):
            self.adopted.inc(len(taken))
            restarted = sum(uid in gains for uid in taken)
            kinds = (len(taken) - restarted, "nobody hosted"), (restarted, "others had started anew")
            said = [f"{counted(count, 'expert')} that {why}" for count, why in kinds if count]
            logger.info("adopted %s", " and ".join(said))

    async def _exchange(self, replicas: Mapping[UID, Collection[Replica]]) -> None:
        """On a full node, exchanges a replica with enough other hosts for one that is needed more.

        It takes the new one first, into the spare room.
        """
        mine, enough = self._replicas.experts, self._enough
        is_full = self._room <= len(mine) < self.capacity
        able = self._given(replicas)
        unread = self._swarm.experts.unread
        wish = exchange(able, mine, self._swarm.host.peer_id, enough, unread) if is_full else None
        if not self._hysteresis.is_due(wish, self._now()) or wish is None:
            return
        self._hysteresis.failed()  # unless the exchange succeeds
        if not await self._proven([wish.gives], replicas, max(1, enough)):
            return
        if await self._take([wish.takes], max(enough, lasting_replicas(replicas[wish.takes]) + 1)):
            gains = self._regressed_elsewhere(replicas, await self._replicas.checkpoints.newest())
            await self._replicas.release([wish.gives], self._vacant_looks.keys() | gains.keys())
            self._hysteresis.done(self._now())
            self.exchanged.inc()
            logger.info("exchanged expert %s, which others host, for %s", wish.gives, wish.takes)

    async def _replicate(self, replicas: Mapping[UID, Collection[Replica]], saved: Mapping[UID, int]) -> None:
        me, mine = self._swarm.host.peer_id, self._replicas.experts
        self.replicated = sum(bool(serving_elsewhere(replicas.get(uid, ()), me)) for uid in mine)
        room = self._room - self._replicas.count
        if room <= 0:
            return
        wanted, enough = self._wanting(replicas, room, saved)
        if wanted:
            # others may have taken them since an earlier look, and a claim costs more than reading them again
            known, self.seen = wanted, await self._survey.read_again(wanted)
            wanted, enough = self._wanting(self.seen, room, saved)
            wanted = [uid for uid in wanted if uid in known]
        if taken := await self._take(wanted, enough):
            self.replicated += len(taken)
            logger.info("took further replicas of %s", counted(len(taken), "expert"))

    def _wanting(
        self, replicas: Mapping[UID, Collection[Replica]], room: int, saved: Mapping[UID, int]
    ) -> tuple[list[UID], int]:
        """The experts of which this node should host further replicas, and how many hosts are then enough."""
        me, mine = self._swarm.host.peer_id, self._replicas.experts
        able = self._given(replicas)
        others = {uid: hosts for uid, hosts in able.items() if uid not in mine}
        if wanted := under_replicated(others, room, me, self._enough, saved):
            return wanted, self._enough
        more = further_replica(able, mine, me, self._swarm.experts.unread)
        if more is None:
            return [], self._enough
        # idle nodes may take the same expert at once, as many as its hosts can serve; other nodes one at a time
        hosts = replicas[more]
        return [more], lasting_replicas(hosts) + 1 if mine else 2 * len(serving_elsewhere(hosts, me))

    def _given(self, replicas: Mapping[UID, Collection[Replica]]) -> Mapping[UID, Collection[Replica]]:
        """Leaves out experts whose state nobody gave: anybody can announce an expert and not give its state, and that
        must not prevent taking others.
        """
        withheld = self._replicas.withheld()
        return {u: hosts for u, hosts in replicas.items() if u not in withheld} if withheld else replicas

    async def _proven(
        self, uids: Collection[UID], replicas: Mapping[UID, Collection[Replica]], enough: int
    ) -> list[UID]:
        """Returns the experts, of `uids`, that at least `enough` other hosts proved to have."""
        if not uids:
            return []
        me, proven = self._swarm.host.peer_id, []

        async def prove(uid: UID) -> None:
            if await self._replicas.are_given(uid, keener(replicas.get(uid, ()), uid, me), enough):
                proven.append(uid)

        with contextlib.suppress(TimeoutError):  # a host that stalls must not hold up everything else
            async with asyncio.timeout(_PROOFS_S):
                await side_by_side(map(prove, [*uids][:_MOST_PROOFS]), _PROOFS_AT_ONCE)
        return proven

    async def _take(
        self, wanted: list[UID], enough: int = 1, replicas: Mapping[UID, Collection[Replica]] | None = None
    ) -> list[UID]:
        """Takes as many of these as there is room for, in their order. `replicas`: of the last look unless given."""
        wanted = wanted[: max(0, self.capacity - self._replicas.count)]
        seen = self.seen if replicas is None else replicas
        return await self._replicas.take(wanted, usual_updates(self.seen), enough, seen) if wanted else []

    async def _take_vacant(self) -> set[UID]:
        """Takes vacant experts. Returns those that others have claimed, but nobody serves yet: the claims may
        be lost.
        """
        me, saved = self._swarm.host.peer_id, await self._replicas.checkpoints.newest()
        replicas = await self._read(saved)
        room = self._room - self._replicas.count
        gains = self._regressed_elsewhere(replicas, saved)
        await self._take(rank_vacancies({*self._vacant(replicas), *gains}, room, me, {**saved, **gains}))
        unserved = {uid for uid, hosts in replicas.items() if not serving_elsewhere(hosts, me)}
        return unserved - self._replicas.experts.keys()

    def _vacant(self, replicas: Mapping[UID, Collection[Replica]]) -> list[UID]:
        """The experts that nobody else hosts. Experts that this node hosted before it was killed may still be
        announced.
        """
        me, mine = self._swarm.host.peer_id, self._replicas.experts
        return [uid for uid in vacant(replicas, besides=me) if uid not in mine]

    def _require_own(self, mine: Collection[UID], replicas: Mapping[UID, Collection[Replica]]) -> None:
        """`mine`: the experts that this node hosted before it read these.

        Raises UnreachableError if this node's own announcements are missing, because others' may be missing, too.
        """
        me, read = self._swarm.host.peer_id, replicas.keys() & mine & self._replicas.experts.keys()
        if not self._replicas.leaving and any(me not in {r.peer_id for r in replicas[uid]} for uid in read):
            raise UnreachableError("the DHT does not return this node's own announcements")

    def _vacant_again(
        self, replicas: Mapping[UID, Collection[Replica]], saved: Mapping[UID, int]
    ) -> dict[UID, int]:
        """The vacant experts, each with the number of looks in a row that found it vacant. An expert of which this node
        has a checkpoint also counts as vacant if none of its hosts answered this node's last call: they are announced
        for some time after they have died.
        """
        vacancies = [*self._vacant(replicas), *self._silent(replicas, saved.keys())]
        return {uid: self._vacant_looks.get(uid, 0) + 1 for uid in vacancies}

    def _silent(self, replicas: Mapping[UID, Collection[Replica]], saved: Set[UID]) -> list[UID]:
        """Those of the `saved` experts whose hosts did not answer this node's last calls. None if half of all hosts did
        not: then it may be this node that is cut off.
        """
        has_failed = self._swarm.host.has_failed
        others = {uid: replicas[uid] for uid in saved & replicas.keys() - self._replicas.experts.keys()}
        silent = [uid for uid, found in answering(others, has_failed).items() if others[uid] and not found]
        if not silent:
            return []
        hosts = hosts_of(replicas) | {self._swarm.host.peer_id}
        return silent if 2 * sum(map(has_failed, hosts)) < len(hosts) else []

    def _regressed_elsewhere(
        self, replicas: Mapping[UID, Collection[Replica]], saved: Mapping[UID, int]
    ) -> dict[UID, int]:
        """The experts that others had to restart while this node was away, with the update counts of this node's
        checkpoints.
        """
        mine = self._replicas.experts
        gains = regressed(replicas, saved, self._swarm.host.peer_id)
        return {uid: gain for uid, gain in gains.items() if uid not in mine}
