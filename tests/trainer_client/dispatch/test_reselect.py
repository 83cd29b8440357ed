"""Only rows that lack answers choose again: properties over random choices and failures."""

from dataclasses import dataclass

import numpy as np
from dispatch_swarm import DEADLINE, LENGTH, make_dispatcher, run
from expert_fakes import (
    SILENT,
    WELL,
    Behaviour,
    FakeSwarm,
    fails,
    make_manifest,
    make_peer_id,
    now,
    random_rows,
)
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from dht.beam_search import Selection
from dht.uid import UID
from peer.identity import PeerID
from trainer_client.dispatch.batches import ForwardPass, RoutedRows, Segments
from trainer_client.dispatch.policy import CircuitBreakers

GRID, ROWS, PEERS = (3, 3), 8, 5


@dataclass
class Case:
    """The input of a pass, and its outcome."""

    swarm: FakeSwarm
    selection: Selection
    avoided: set[PeerID]
    result: ForwardPass

    def asked(self, row: int) -> list[UID]:
        """The experts that a row was sent to, in order of the calls."""
        return [
            part.uid
            for call in self.swarm.called("forward")
            for part in call.batch.parts()
            if row in call.batch.rows[part.places]
        ]

    def chosen(self, row: int) -> list[UID]:
        return [
            UID(0, tuple(coordinate))
            for coordinate in self.selection.coordinates[row, self.selection.valid[row]].tolist()
        ]

    def answers_at_once(self, uid: UID) -> bool:
        peer = self.swarm.peer_of[uid]
        behaviours = self.swarm.behaviours
        is_well = behaviours.get(uid, WELL) == WELL and behaviours.get(peer, WELL) == WELL
        return is_well and peer not in self.avoided


def passes(draw: st.DrawFn, behaviours: list[Behaviour]) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, k_min = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    swarm = FakeSwarm(make_manifest(GRID), PEERS)
    for expert in swarm.manifest.uids():
        swarm.behaviours[expert] = draw(st.sampled_from([WELL, *behaviours]))
    avoided = {make_peer_id(n) for n in draw(st.sets(st.integers(0, PEERS - 1), max_size=3))}
    chosen = np.array([rng.choice(9, k, replace=False) for _ in range(ROWS)])
    valid = rng.random((ROWS, k)) < 0.8  # a router may leave slots out by chance
    valid[:, 0] = True
    selection = Selection(
        np.stack(np.unravel_index(chosen, GRID), axis=-1), np.zeros((ROWS, k), np.float32), valid
    )
    scores = [rng.standard_normal((ROWS, 3), dtype=np.float32) for _ in GRID]
    found: list[ForwardPass] = []

    async def scenario() -> None:
        breakers = CircuitBreakers()
        dispatcher = make_dispatcher(swarm, k_min=k_min, breakers=breakers)
        live = await dispatcher.find(0, scores, k)
        for peer_id in avoided:  # between choosing and sending
            breakers.distrust(peer_id, now())
        rows = RoutedRows(
            0,
            live.tables[-1].shape,
            random_rows(ROWS),
            scores,
            k,
            Segments.whole(ROWS // LENGTH, LENGTH),
            keep=False,
        )
        found.append(await dispatcher.send(rows, selection, live))
        assert now() <= DEADLINE
        await dispatcher.close()

    run(scenario())
    return Case(swarm, selection, avoided, found[0])


@st.composite
def with_refusals(draw: st.DrawFn) -> Case:
    """Cases in which experts that fail report it: no call is lost, late or repeated."""
    return passes(draw, [fails(StatusCode.NOT_FOUND), fails(StatusCode.INTERNAL, after_s=0.3)])


@st.composite
def with_all_faults(draw: st.DrawFn) -> Case:
    late = [Behaviour(after_s=part * DEADLINE) for part in (0.3, 0.6)]
    return passes(draw, [fails(), fails(after_s=0.5), fails(StatusCode.NOT_FOUND), SILENT, *late])


@given(with_refusals())
def test_no_row_is_sent_twice_to_one_expert(case: Case) -> None:
    for row in range(ROWS):
        asked = case.asked(row)
        assert len(asked) == len(set(asked))


@given(with_all_faults())
def test_avoided_peers_are_never_called(case: Case) -> None:
    assert not {call.peer_id for call in case.swarm.calls} & case.avoided


@given(with_all_faults())
def test_slots_of_experts_that_answer_keep_the_routers_choice(case: Case) -> None:
    for row in range(ROWS):
        for slot in np.flatnonzero(case.selection.valid[row]):
            uid = UID(0, tuple(case.selection.coordinates[row, slot].tolist()))
            if case.answers_at_once(uid):
                assert case.result.answered[row, slot]
                assert tuple(case.result.coordinates[row, slot].tolist()) == uid.coordinate


@given(with_all_faults())
def test_a_row_whose_experts_all_answer_is_sent_nowhere_else(case: Case) -> None:
    for row in range(ROWS):
        chosen = case.chosen(row)
        if all(map(case.answers_at_once, chosen)):
            assert sorted(case.asked(row)) == sorted(chosen)
            assert case.result.answered[row].sum() == len(chosen)


@given(with_all_faults())
def test_no_row_has_an_expert_twice(case: Case) -> None:
    for row in range(ROWS):
        there = case.result.coordinates[row, case.result.answered[row]].tolist()
        assert len({tuple(coordinate) for coordinate in there}) == len(there)
