"""Sequences whose rows experts keep: the first rows are sent like any others, and then one row at a time.

Further rows go only to the replicas that hold the earlier ones. If one of these does not answer, or no longer holds
them, the sequence can't be continued: the caller has to send its rows again from the first. Nor is it continued at a
replica that was slow if another host is much quicker.

Shapes: R rows, each of another sequence, K slots of each row, s segments of one batch.
"""

import secrets
from collections.abc import Iterable, Sequence

import numpy as np

from dht.beam_search import Selection
from dht.directory import LiveExperts
from dht.uid import UID
from peer.codec import Integers, codec_of
from peer.identity import PeerID
from trainer_client.dispatch.batches import (
    AnsweredRows,
    CallEnded,
    ExpertReply,
    ForwardPass,
    HeldRows,
    HeldSequence,
    NodeBatch,
    NodeCall,
    RoutedRows,
    SentBatch,
    relative_weights,
)
from trainer_client.dispatch.calls import CallTracker, Replies, next_replies
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.dispatch.replicas import has_quicker_host


def new_numbers(count: int) -> list[int]:
    """New numbers by which nodes identify sequences that they have not seen."""
    return [secrets.randbits(64) for _ in range(count)]


def note_held(held: Sequence[HeldSequence], selection: Selection, result: ForwardPass) -> None:
    """Records what experts keep after sequences were sent as a whole.

    A sequence can be continued if every expert of its rows has answered all rows that it was sent, in one call.
    """
    of_rows = result.rows.segments.of_rows
    lacking = result.answered.sum(axis=1) < selection.valid.sum(axis=1)
    for number in np.unique(of_rows[lacking]).tolist():
        held[number].is_answered = held[number].can_go_on = False
    for sent in result.answers:
        batch, peer_id = sent.batch, sent.node.peer_id
        segments = batch.segment_of_row
        firsts = np.cumsum(batch.lengths) - batch.lengths
        sequences = of_rows[batch.rows[firsts]]
        for part in batch.parts():
            counted = np.bincount(segments[part.places[sent.counts[part.places, part.slots]]])
            counts = np.bincount(segments[part.places])
            for segment in np.flatnonzero(counted).tolist():
                sequence, number = held[sequences[segment]], sent.numbers[segment]
                is_whole = counted[segment] == counts[segment] and part.uid not in sequence.experts
                is_known_by = sequence.numbers.setdefault(peer_id, number) == number
                if sent.progress.kept is None:
                    sequence.forgetful.add(peer_id)
                if sent.progress.kept is None or not (is_whole and is_known_by):
                    sequence.can_go_on = False
                sequence.experts[part.uid] = HeldRows(peer_id, int(counts[segment]))


async def go_on(
    rows: RoutedRows, selection: Selection, live: LiveExperts, calls: CallTracker, policy: WaitPolicy
) -> ForwardPass:
    """Sends the next row of each sequence, and records what is held then."""
    assert rows.held is not None, "there are rows before these"
    result = ForwardPass.of(rows)
    result.coordinates[:] = selection.coordinates
    whole = NodeBatch.of(rows.layer, selection.coordinates, selection.valid, rows.grid, rows.segments)
    peers, at = _replicas(whole, rows.held, live, calls.avoided())
    call_times = calls.latencies.calls["forward"]
    deadline_s, slow_s = policy.deadline_s(call_times), policy.hedge_after_s(call_times)
    began, replies = calls.now(), Replies()
    ends = began + deadline_s
    sent: dict[NodeBatch, SentBatch] = {}
    for number, peer_id in enumerate(peers):
        batch, _ = whole.only(at == number)
        logits = rows.logits(batch.rows, result.coordinates[batch.rows])
        weights = relative_weights(logits, batch.asked, codec_of(live.view.manifest.wire.codec))
        sequences = [rows.held[row] for row in batch.rows.tolist()]
        numbers = [
            sequence.numbers.setdefault(peer_id, fresh)
            for sequence, fresh in zip(sequences, new_numbers(len(sequences)), strict=True)
        ]
        node = live.view.nodes[peer_id]
        call = NodeCall(
            node,
            "forward",
            batch,
            deadline_s,
            rows.inputs[batch.rows],
            weights,
            numbers=numbers,
            held=np.array([[_count(sequence, uid) for uid in batch.uids] for sequence in sequences]),
        )
        sent[batch] = SentBatch(batch, node, weights, calls.start(call, replies), numbers=numbers)
    open_calls, slow = len(sent), list[SentBatch]()
    while open_calls and (left_s := ends - calls.now()) > 0:
        for reply in await next_replies(replies, left_s):
            if isinstance(reply, AnsweredRows):
                accepted = result.accept(sent[reply.batch], reply)
                calls.credit.note(sent[reply.batch].node, pairs=int(accepted.sum()))
            elif isinstance(reply, ExpertReply) and reply.has_forgotten:
                its_rows = (reply.batch.experts == reply.batch.uids.index(reply.uid)).any(axis=1)
                for row in reply.batch.rows[its_rows].tolist():
                    rows.held[row].forgetful.add(sent[reply.batch].node.peer_id)
            elif isinstance(reply, CallEnded):
                open_calls -= 1
                if calls.now() - began > slow_s:
                    slow.append(sent[reply.batch])
    _note_next(rows.held, whole, result, sent.values())
    _leave_slow(rows.held, slow, live, calls)
    return result


def _replicas(
    batch: NodeBatch, held: Sequence[HeldSequence], live: LiveExperts, avoided: frozenset[PeerID]
) -> tuple[list[PeerID], Integers]:
    """The peers to call, and the index of the peer for each slot; -1 where none is called: [R, K]."""
    numbers: dict[PeerID, int] = {}
    at = np.full(batch.experts.shape, -1)
    for row, slot in np.argwhere(batch.asked).tolist():
        uid, sequence = batch.uids[batch.experts[row, slot]], held[row]
        known = sequence.experts.get(uid)
        peer_id = known.peer_id if known is not None else live.hosts.get(uid)
        lacks_rows = known is None and sequence.is_routed_as_one
        if peer_id is not None and peer_id in live.view.nodes and peer_id not in avoided and not lacks_rows:
            at[row, slot] = numbers.setdefault(peer_id, len(numbers))
    return list(numbers), at


def _note_next(
    held: Sequence[HeldSequence], batch: NodeBatch, result: ForwardPass, sent: Iterable[SentBatch]
) -> None:
    lacking = batch.asked & ~result.answered
    for row, sequence in enumerate(held):
        sequence.is_answered = not lacking[row].any()
        sequence.can_go_on &= sequence.is_answered
    for each in sent:
        for row, numbers in zip(each.batch.rows.tolist(), each.batch.experts.tolist(), strict=True):
            held[row].can_go_on &= each.progress.kept is not None
            for number in numbers:
                if number >= 0:
                    uid = each.batch.uids[number]
                    held[row].experts[uid] = HeldRows(each.node.peer_id, _count(held[row], uid) + 1)


def _leave_slow(
    held: Sequence[HeldSequence], slow: Iterable[SentBatch], live: LiveExperts, calls: CallTracker
) -> None:
    """Ends sequences at slow replicas whose experts have a much quicker host. Otherwise a node that answers first rows
    at once, and further rows late, could keep a sequence waiting until its end.
    """
    avoided, times_s = calls.avoided(), calls.latencies.nodes_lately(calls.now())
    for each in slow:
        batch, peer_id = each.batch, each.node.peer_id
        if any(has_quicker_host(uid, peer_id, live.view, avoided, times_s) for uid in batch.uids):
            for row in batch.rows.tolist():
                held[row].can_go_on = False


def _count(sequence: HeldSequence, uid: UID) -> int:
    known = sequence.experts.get(uid)
    return 0 if known is None else known.count
