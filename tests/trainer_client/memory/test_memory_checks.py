"""How hosts' answers are read, and what is believed of them."""

import random

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import MEMORY, SWARM, SampleHost, SampleMemory, peer_ids

from dht.memory import (
    MAX_DIMENSIONS,
    MAX_K,
    MAX_LABEL_CHARACTERS,
    MAX_LEAVES,
    MAX_LICENSE_CHARACTERS,
    MAX_READ,
    MAX_TEXT_CHARACTERS,
    Passage,
)
from peer import PROTOCOL_VERSION
from peer.errors import WireError
from peer.parsing import has_few_parts
from peer.rpc.calls import or_empty
from peer.wire import memory_pb2
from trainer_client.memory.calls import most_bytes, most_parts
from trainer_client.memory.checks import Answer, Ask, Findings, omitted, parse_passages

MEMORY_HERE = SampleMemory.make(0)
ONE, OTHER = peer_ids(2)
K = 4


def an_ask(numbers: list[int], queries: int, k: int = K) -> Ask:
    """A request for all queries in some of the shards, which are given by number."""
    infos = MEMORY_HERE.manifest.shards
    shards = tuple(infos[number % len(infos)] for number in dict.fromkeys(n % len(infos) for n in numbers))
    return Ask(shards, (tuple(range(queries)),) * len(shards), k)


def answered(ask: Ask, vectors: list[int], host: SampleHost | None = None) -> memory_pb2.SearchReply:
    request = ask.request(SWARM, PROTOCOL_VERSION, str(MEMORY), MEMORY_HERE.vectors_ND[vectors])
    return (host or SampleHost(MEMORY_HERE, MEMORY_HERE.manifest.by_root)).search(request)


small = st.integers(0, 9)
founds = st.builds(
    memory_pb2.Found,
    shards=st.lists(small, max_size=5),
    positions=st.lists(small, max_size=5),
    scores=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    texts=st.lists(st.integers(0, 2), max_size=5),
    text_positions=st.lists(small, max_size=5),
)


@given(
    found=st.lists(founds, max_size=3),
    missing=st.lists(small, max_size=3),
    text_roots=st.lists(
        st.sampled_from([bytes(32), MEMORY_HERE.manifest.shards[0].root, b"short"]), max_size=2
    ),
    queries=st.integers(1, 3),
)
def test_an_answer_is_refused_or_has_only_what_was_asked_for(
    found: list[memory_pb2.Found], missing: list[int], text_roots: list[bytes], queries: int
) -> None:
    ask = an_ask([0, 1, -1], queries)
    try:
        answer = ask.parse(memory_pb2.SearchReply(found=found, missing=missing, text_roots=text_roots), ONE)
    except WireError:
        return
    assert answer.claims.keys() == set(range(queries))
    for query, claims in answer.claims.items():
        assert len(claims) <= ask.k
        assert [c.score for c in claims] == sorted((c.score for c in claims), reverse=True)
        assert len({claim.found for claim in claims}) == len(claims)
        for claim in claims:
            info = MEMORY_HERE.manifest.by_root[claim.found.root]
            assert info.root in answer.looked_up(query)
            assert claim.found.position < info.leaves
            assert claim.text.root in text_roots if info.is_secondary else claim.text == claim.found


@pytest.mark.parametrize(
    "lie", ["a passage beyond the end", "a passage twice", "a shard that was not asked for"]
)
def test_an_answer_with_one_impossible_place_is_refused(lie: str) -> None:
    ask = an_ask([0], 1)
    reply = answered(ask, [3])
    ask.parse(reply, ONE)
    found = reply.found[0]
    if lie == "a passage beyond the end":
        found.positions[0] = ask.shards[0].leaves
    elif lie == "a passage twice":
        for column in (found.shards, found.positions, found.scores, found.texts, found.text_positions):
            column[1] = column[0]
    else:
        reply.missing.append(1)
    with pytest.raises(WireError):
        ask.parse(reply, ONE)


@pytest.mark.parametrize("queries", [1, 40])
def test_no_honest_answer_is_larger_than_answers_may_be(queries: int) -> None:
    everything = list(range(len(MEMORY_HERE.manifest.shards)))
    ask = an_ask(everything, queries, k=MAX_K)
    vectors_QD = MEMORY_HERE.vectors_ND[:queries]
    request = ask.request(SWARM, PROTOCOL_VERSION, str(MEMORY), vectors_QD)
    host = SampleHost(MEMORY_HERE, MEMORY_HERE.manifest.by_root)
    honest = host.search(request).SerializeToString()
    assert 500 < len(honest) <= most_bytes(request)
    assert has_few_parts(honest, memory_pb2.SearchReply.DESCRIPTOR, most_parts(request))
    asked = memory_pb2.ReadRequest(
        shards=[memory_pb2.ShardPositions(root=MEMORY_HERE.manifest.shards[0].root, positions=[0])]
    )
    wide = "\U0001f525"
    longest = memory_pb2.ProvenPassage(
        shard=255,
        position=MAX_LEAVES - 1,
        passage=Passage(
            wide * MAX_TEXT_CHARACTERS,
            wide * MAX_LABEL_CHARACTERS,
            wide * MAX_LABEL_CHARACTERS,
            2**63,
            wide * MAX_LICENSE_CHARACTERS,
        ).message(),
        vector=bytes(MAX_DIMENSIONS),
        path=bytes(32 * 16),
    )
    assert memory_pb2.ReadReply(passages=[longest]).ByteSize() <= most_bytes(asked)
    whole = memory_pb2.ReadReply(passages=[longest] * MAX_READ).SerializeToString()
    assert has_few_parts(whole, memory_pb2.ReadReply.DESCRIPTOR, most_parts(asked))


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (
            memory_pb2.SearchRequest(k=2 * K, vectors=bytes(16 * MAX_DIMENSIONS)),
            memory_pb2.SearchReply(found=[memory_pb2.Found()]),
        ),
        (
            memory_pb2.ReadRequest(shards=[memory_pb2.ShardPositions(positions=range(MAX_READ))]),
            memory_pb2.ReadReply(passages=[memory_pb2.ProvenPassage(passage=memory_pb2.Passage())]),
        ),
    ],
    ids=["search", "read"],
)
def test_an_answer_of_very_many_parts_is_not_parsed_although_it_is_not_too_long(
    request_: memory_pb2.SearchRequest | memory_pb2.ReadRequest, reply: Message
) -> None:
    part = reply.SerializeToString()
    data = part * (most_bytes(request_) // len(part))
    parse = or_empty(type(reply).FromString, most_bytes(request_), most_parts(request_))
    assert parse(data) == type(reply)()


def test_an_honest_answer_is_read_as_it_was_given() -> None:
    ask = an_ask([0, 1], 2)
    answer = ask.parse(answered(ask, [5, 6]), ONE)
    for query, number in enumerate((5, 6)):
        best = MEMORY_HERE.best(MEMORY_HERE.vectors_ND[number], {s.cell for s in ask.shards}, 100)
        assert all(claim.score in {score for score, _ in best} for claim in answer.claims[query])
        assert len(answer.claims[query]) == K


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.passage.ClearField("text"),
        lambda m: setattr(m.passage, "license", "MIT"),
        lambda m: setattr(m, "vector", m.vector[:-1]),
        lambda m: setattr(m, "vector", bytes(8)),
        lambda m: setattr(m, "path", m.path[:-1]),
        lambda m: setattr(m, "path", m.path + bytes(32)),
        lambda m: setattr(m, "position", m.position + 1),
        lambda m: setattr(m, "shard", 1),
        lambda m: setattr(m.passage, "text", "a" * 10_000),
    ],
)
def test_a_passage_that_was_changed_is_not_believed(spoil: object) -> None:
    manifest = MEMORY_HERE.manifest
    root = manifest.shards[0].root
    request = memory_pb2.ReadRequest(shards=[memory_pb2.ShardPositions(root=root, positions=[1])])
    reply = SampleHost(MEMORY_HERE, manifest.by_root).read(request)
    (proven,) = parse_passages(reply, {root: [1]}, manifest, ONE).values()
    assert proven.passage in MEMORY_HERE.passages
    assert callable(spoil)
    spoil(reply.passages[0])
    with pytest.raises(WireError):
        parse_passages(reply, {root: [1]}, manifest, ONE)


def test_a_passage_comes_once_and_only_if_it_was_asked_for() -> None:
    manifest = MEMORY_HERE.manifest
    root = manifest.shards[0].root
    request = memory_pb2.ReadRequest(shards=[memory_pb2.ShardPositions(root=root, positions=[0, 1])])
    reply = SampleHost(MEMORY_HERE, manifest.by_root).read(request)
    reply.passages[1].CopyFrom(reply.passages[0])
    with pytest.raises(WireError, match="or one twice"):
        parse_passages(reply, {root: [0, 1]}, manifest, ONE)
    with pytest.raises(WireError, match="asked for 1 passage, but"):
        parse_passages(reply, {root: [0]}, manifest, ONE)


@given(
    one=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    other=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    number=st.integers(0, 39),
    seed=st.integers(0, 2**16),
)
def test_honest_hosts_omit_nothing_and_whatever_is_found_omitted_was_left_out(
    one: list[int], other: list[int], number: int, seed: int
) -> None:
    """The two hosts may be asked for different shards."""
    asks = an_ask(one, 1), an_ask(other, 1, k=3)
    answers = [ask.parse(answered(ask, [number]), host) for ask, host in zip(asks, (ONE, OTHER), strict=True)]
    assert not omitted(0, *answers)
    assert not omitted(0, *reversed(answers))
    host = SampleHost(MEMORY_HERE, MEMORY_HERE.manifest.by_root, "omits", rng=random.Random(seed))
    spoilt = asks[1].parse(answered(asks[1], [number], host), OTHER)
    kept = {claim.text for claim in spoilt.claims[0]}
    assert all(claim.text not in kept for claim in omitted(0, answers[0], spoilt))
    assert not omitted(0, spoilt, answers[0])


def test_an_omission_is_found_where_both_have_looked() -> None:
    ask = an_ask([0, 1], 1)
    whole = ask.parse(answered(ask, [5]), ONE)
    first, *rest = whole.claims[0]
    without = Answer(ask, OTHER, {0: [c for c in rest if c.text != first.text]}, whole.present)
    assert first in omitted(0, whole, without)
    elsewhere = Answer(ask, OTHER, without.claims, whole.present - {first.found.root})
    assert first not in omitted(0, whole, elsewhere)


def test_the_first_lie_drops_all_that_a_host_said() -> None:
    ask = an_ask([0, 1], 1)
    vectors_QD = MEMORY_HERE.vectors_ND[[5]]
    findings = Findings(MEMORY_HERE.manifest, vectors_QD, K)
    honest = ask.parse(answered(ask, [5]), ONE)
    liar = SampleHost(MEMORY_HERE, MEMORY_HERE.manifest.by_root, "inflated scores")
    findings.add(honest)
    findings.add(ask.parse(answered(ask, [5], liar), OTHER))
    assert all({claim.host for claim in claims} == {OTHER} for claims in findings.unproven().values())
    place = next(iter(findings.unproven()))
    request = memory_pb2.ReadRequest(
        shards=[memory_pb2.ShardPositions(root=place.root, positions=[place.position])]
    )
    reply = SampleHost(MEMORY_HERE, MEMORY_HERE.manifest.by_root).read(request)
    findings.prove(parse_passages(reply, {place.root: [place.position]}, MEMORY_HERE.manifest, ONE))
    assert all({claim.host for claim in claims} == {ONE} for claims in findings.unproven().values())
    assert findings.liars == {OTHER}
    (found,) = findings.results(0)
    assert found[0] == int(vectors_QD[0].astype(int) @ np.asarray(found[2].vector_D).astype(int))
