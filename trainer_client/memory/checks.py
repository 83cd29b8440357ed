"""What hosts claim about a memory, and which claims are true. Pure.

A host answers a search with claims: a passage's text is at that place, and it has that score. Reading the passage there
decides whether a claim is true: the Merkle path shows that this text with this vector is at that place of a shard in
the signed manifest, and the score follows from the vectors. So a host can leave a passage out, but it can't forge one
or raise its rank. If one claim of a host is false, everything it said is dropped.

Omissions are found by asking two hosts for the same shards. If one of them returned a passage that belongs in the
other's answer, and it is proven that the passage is in the shard, then the other omitted it.

Shapes: Q queries, D numbers in a vector.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dht.memory import MemoryManifest, Passage, Place, ShardInfo, Vectors, prove
from peer.errors import WireError
from peer.formatting import counted
from peer.identity import PeerID
from peer.merkle import HASH_BYTES
from peer.wire import memory_pb2


class Claim(NamedTuple):
    """A host's claim about one passage."""

    score: int
    """Inner product of its vector and the query's."""
    text: Place
    """Where its text is."""
    found: Place
    """Where it was found: at the same place, or in a secondary shard."""
    host: PeerID


@dataclass(frozen=True)
class Ask:
    """The content of one call to a host: shards, and the queries to look up in each of them."""

    shards: tuple[ShardInfo, ...]
    queries: tuple[tuple[int, ...], ...]
    """For each shard, the numbers of the queries in the search, ascending."""
    k: int

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """The queries in the call, by their number in the search."""
        return tuple(sorted(set().union(*self.queries)))

    def request(
        self, swarm_id: str, version: int, memory: str, vectors_QD: Vectors
    ) -> memory_pb2.SearchRequest:
        number_of = {query: number for number, query in enumerate(self.sent)}
        return memory_pb2.SearchRequest(
            protocol_version=version,
            swarm_id=swarm_id,
            memory=memory,
            k=self.k,
            vectors=vectors_QD[list(self.sent)].tobytes(),
            shards=[
                memory_pb2.ShardQueries(
                    root=shard.root,
                    queries=() if queries == self.sent else [number_of[query] for query in queries],
                )
                for shard, queries in zip(self.shards, self.queries, strict=True)
            ],
        )

    def parse(self, reply: memory_pb2.SearchReply, host: PeerID) -> "Answer":
        """Raises WireError for a reply that no honest host gives."""
        missing = set(reply.missing[: len(self.shards)])
        if len(missing) != len(reply.missing) or not missing <= set(range(len(self.shards))):
            raise WireError("the list of missing shards has one that was not asked for, or one twice")
        if len(reply.found) != len(self.sent):
            raise WireError(f"the search has {len(self.sent)} queries, but {len(reply.found)} answers")
        if any(len(root) != HASH_BYTES for root in reply.text_roots):
            raise WireError("a text's shard has no valid name")
        asked = [frozenset(queries) for queries in self.queries]
        claims = {}
        for query, found in zip(self.sent, reply.found, strict=True):
            claims[query] = self._claims(query, found, host, asked, missing, reply.text_roots)
        present = frozenset(shard.root for number, shard in enumerate(self.shards) if number not in missing)
        return Answer(self, host, claims, present)

    def _claims(
        self,
        query: int,
        found: memory_pb2.Found,
        host: PeerID,
        asked: Sequence[frozenset[int]],
        missing: Collection[int],
        text_roots: Sequence[bytes],
    ) -> list[Claim]:
        count = len(found.scores)
        columns = found.shards, found.positions, found.texts, found.text_positions
        if count > self.k or any(len(column) != count for column in columns):
            raise WireError(f"{count} scores came for {self.k} passages, or not as many places as scores")
        claims = []
        places = set()
        last: int | None = None
        for number, position, text, text_position, score in zip(*columns, found.scores, strict=True):
            if number >= len(self.shards) or number in missing or query not in asked[number]:
                raise WireError("a passage is from a shard in which its query was not looked up")
            shard = self.shards[number]
            if position >= shard.leaves or (number, position) in places:
                raise WireError("the answer has a passage that is not in its shard, or one twice")
            if last is not None and score > last:
                raise WireError("passages are not in the order of their scores")
            if bool(text) != shard.is_secondary or text > len(text_roots):
                raise WireError("a passage has no place for its text")
            last = score
            places.add((number, position))
            place = Place(shard.root, position)
            claims.append(
                Claim(score, Place(text_roots[text - 1], text_position) if text else place, place, host)
            )
        return claims


@dataclass(frozen=True)
class Answer:
    """A host's answer to a search."""

    ask: Ask
    host: PeerID
    claims: Mapping[int, Sequence[Claim]]
    """The claims for each query, best first."""
    present: frozenset[bytes]
    """The roots of the shards that the host has."""

    def looked_up(self, query: int) -> frozenset[bytes]:
        """The shards that the host has searched for the query."""
        return frozenset(
            shard.root
            for shard, queries in zip(self.ask.shards, self.ask.queries, strict=True)
            if query in queries and shard.root in self.present
        )


@dataclass(frozen=True, eq=False)
class Proven:
    """A passage that is proven to be in the memory. It may have been revoked."""

    text: Place
    """Where its text is."""
    passage: Passage | None
    """None if it was read in a secondary shard."""
    vector_D: Vectors
    leaf: bytes
    reader: PeerID
    """The host that gave it."""

    def score(self, query_D: Vectors) -> int:
        return int(query_D.astype(np.int32) @ self.vector_D.astype(np.int32))


def parse_passages(
    reply: memory_pb2.ReadReply,
    asked: Mapping[bytes, Collection[int]],
    manifest: MemoryManifest,
    host: PeerID,
) -> dict[Place, Proven]:
    """The passages that were read, as far as the host has them.

    `asked`: positions by root, in the order of the request. Raises WireError for a reply that no honest host gives.
    """
    found = {}
    for place, message, info in _given(reply, asked, manifest):
        if message.vector if info.is_secondary else message.HasField("passage"):  # otherwise it was revoked
            found[place] = _prove(message, info, manifest.dimensions, host)
    return found


def parse_revoked(
    reply: memory_pb2.ReadReply, asked: Mapping[bytes, Collection[int]], manifest: MemoryManifest
) -> frozenset[Place]:
    """The passages that the host says were revoked. It may know a later revision. Arguments and errors as above."""
    given = _given(reply, asked, manifest)
    return frozenset(place for place, message, info in given if prove(message, info).is_revoked)


def _given(
    reply: memory_pb2.ReadReply, asked: Mapping[bytes, Collection[int]], manifest: MemoryManifest
) -> Iterator[tuple[Place, memory_pb2.ProvenPassage, ShardInfo]]:
    roots = list(asked)
    wanted = {Place(root, position) for root, positions in asked.items() for position in positions}
    if len(reply.passages) > len(wanted):
        raise WireError(f"asked for {counted(len(wanted), 'passage')}, but {len(reply.passages)} arrived")
    for message in reply.passages:
        if message.shard >= len(roots):
            raise WireError("a passage is from a shard that was not asked for")
        place = Place(roots[message.shard], message.position)
        if place not in wanted:
            raise WireError("the answer has a passage that was not asked for, or one twice")
        wanted.remove(place)
        yield place, message, manifest.by_root[place.root]


def _prove(message: memory_pb2.ProvenPassage, info: ShardInfo, dimensions: int, host: PeerID) -> Proven:
    if len(message.vector) != dimensions:
        raise WireError(f"a vector has {len(message.vector)} bytes instead of {dimensions}")
    proof = prove(message, info)
    return Proven(proof.text, proof.passage, np.frombuffer(proof.vector, np.int8), proof.leaf, host)


class Findings:
    """All claims about the queries of one search, and which of them are proven."""

    def __init__(self, manifest: MemoryManifest, vectors_QD: Vectors, k: int) -> None:
        """`k`: the number of passages wanted for each query."""
        self.proven: dict[Place, Proven] = {}
        self.liars: set[PeerID] = set()
        """Hosts that made a false claim."""
        self._vectors_QD = vectors_QD
        self._k = k
        self._manifest = manifest
        self._claims: list[list[Claim]] = [[] for _ in vectors_QD]
        self._unsorted: set[int] = set()
        """Queries whose claims are not in the order of `_rank`."""
        self._unreadable: set[Place] = set()
        self._true: set[tuple[int, Claim]] = set()

    def add(self, answer: Answer) -> None:
        for query, claims in answer.claims.items():
            # a secondary shard may name passages of another revision, or passages that its publisher made up
            self._claims[query] += (claim for claim in claims if self._manifest.has_text_at(claim.text))
            self._unsorted.add(query)

    def prove(self, passages: Mapping[Place, Proven]) -> None:
        self.proven |= passages

    def give_up(self, places: Iterable[Place]) -> None:
        """Records that no host could give the passages at these places."""
        self._unreadable.update(places)

    def best(self, query: int) -> list[Claim]:
        """The query's best passages, without duplicates, according to the claims that are not known to be false.
        Records hosts whose claims proved false.
        """
        while True:
            ranked = self._ranked(query)
            known = len(self.liars)
            for claim in ranked:
                proven = self.proven.get(claim.text)
                if proven is not None and not self._is_true(query, claim, proven):
                    self.liars.add(claim.host)
            if len(self.liars) == known:
                return ranked

    def unproven(self) -> dict[Place, list[Claim]]:
        """The texts that must still be read to know the best passages of all queries, with their claims. Records hosts
        that lied, and leaves out texts that only they claim.
        """
        wanted: dict[Place, list[Claim]] = {}
        for query in range(len(self._claims)):
            for claim in self.best(query):
                if claim.text not in self.proven:
                    wanted.setdefault(claim.text, []).append(claim)
        return wanted

    def unread(self, query: int) -> set[Place]:
        """The texts that may be among the query's results, but that no host gives."""
        return {
            claim.text
            for claim in self._claims[query]
            if claim.text in self._unreadable and claim.host not in self.liars
        }

    def results(self, query: int) -> list[tuple[int, Passage, Proven]]:
        """The query's best proven passages with their scores. None is revoked, because claims about revoked passages
        are dropped.
        """
        best = ((claim, self.proven.get(claim.text)) for claim in self.best(query))
        return [
            (claim.score, proven.passage, proven)
            for claim, proven in best
            if proven is not None and proven.passage is not None
        ]

    def _ranked(self, query: int) -> list[Claim]:
        if query in self._unsorted:
            self._claims[query].sort(key=_rank)
            self._unsorted.remove(query)
        ranked: list[Claim] = []
        texts: set[Place] = set()
        for claim in self._claims[query]:
            text = claim.text
            if text in texts or claim.host in self.liars or text in self._unreadable:
                continue
            if text not in self._manifest.revoked:
                texts.add(text)
                ranked.append(claim)
                if len(ranked) == self._k:
                    break
        return ranked

    def _is_true(self, query: int, claim: Claim, proven: Proven) -> bool:
        if (query, claim) in self._true:
            return True
        if not agrees(claim, proven, self._vectors_QD[query]):
            return False
        self._true.add((query, claim))
        return True


def _rank(claim: Claim) -> tuple[int, Place, bool]:
    """The sort key: the best claim first. Of several claims about one passage, that of a host with its text comes
    first.
    """
    return -claim.score, claim.text, claim.found != claim.text


def agrees(claim: Claim, proven: Proven, query_D: Vectors) -> bool:
    """Whether a claim is true, judged by what is at the place where the passage was found, or where its text is."""
    return proven.text == claim.text and proven.score(query_D) == claim.score


def omitted(query: int, one: Answer, other: Answer) -> list[Claim]:
    """The claims of `one` that `other` should have made too, and did not. They still have to be proven. Compares the
    shards in which both looked up the query. If the lowest scores are equal, either passage may be the last one.
    """
    shared = one.looked_up(query) & other.looked_up(query)
    theirs = other.claims.get(query, ())
    said = {(claim.text, claim.score) for claim in theirs}
    is_full = len(theirs) >= other.ask.k
    return [
        claim
        for claim in one.claims.get(query, ())
        if claim.found.root in shared
        and (claim.text, claim.score) not in said
        and not (is_full and claim.score <= theirs[-1].score)
    ]
