"""What hosts say about a memory, and what of it is true. Pure.

A host answers a search with claims: a passage lies at that place and has that score. Reading a passage settles it: the
Merkle path shows that this text with this vector lies at that place of a shard in the signed manifest, and the score
follows from the vectors. So a host can leave a passage out, but it can't forge one, nor promote it. Whoever claims what
is not so has everything it said dropped.

Omissions are found by asking two hosts for the same shards. A passage that one of them returned and that would have had
a place in the other's answer was omitted by the other, once it is proven.

Shapes: Q queries, D numbers in a vector.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dht.memory import LEAF_PREFIX_BYTES, MemoryManifest, Passage, ShardInfo, prove
from peer.errors import WireError
from peer.identity import PeerID
from peer.wire import memory_pb2
from trainer_client.memory.encoder import Vectors


class Place(NamedTuple):
    """Where a passage lies."""

    root: bytes
    """Of its shard."""
    position: int


class Claim(NamedTuple):
    """What a host says of one passage."""

    score: int
    """Inner product of its vector and the query's."""
    leaf: bytes
    """The first 16 bytes of its hash."""
    place: Place
    host: PeerID


@dataclass(frozen=True)
class Ask:
    """What one call asks a host: shards, and which queries are looked up in each of them."""

    shards: tuple[ShardInfo, ...]
    queries: tuple[tuple[int, ...], ...]
    """Of each shard: numbers of queries in the search, rising."""
    k: int

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """The queries that the call carries, by their number in the search."""
        return tuple(sorted(set().union(*self.queries)))

    def request(
        self, swarm_id: str, version: int, memory: str, vectors_QD: Vectors
    ) -> memory_pb2.SearchRequest:
        number_of = {query: number for number, query in enumerate(self.sent)}
        everything = self.sent
        return memory_pb2.SearchRequest(
            protocol_version=version,
            swarm_id=swarm_id,
            memory=memory,
            k=self.k,
            vectors=vectors_QD[list(self.sent)].tobytes(),
            shards=[
                memory_pb2.ShardQueries(
                    root=shard.root,
                    queries=() if queries == everything else [number_of[query] for query in queries],
                )
                for shard, queries in zip(self.shards, self.queries, strict=True)
            ],
        )

    def parse(self, reply: memory_pb2.SearchReply, host: PeerID) -> "Answer":
        """Raises WireError if no honest host answers so."""
        missing = set(reply.missing[: len(self.shards)])
        if len(missing) != len(reply.missing) or not missing <= set(range(len(self.shards))):
            raise WireError("a search whose missing shards are not those that were asked for")
        if len(reply.found) != len(self.sent):
            raise WireError(f"a search of {len(self.sent)} queries with {len(reply.found)} answers")
        asked = [frozenset(queries) for queries in self.queries]
        claims = {}
        for query, found in zip(self.sent, reply.found, strict=True):
            claims[query] = self._claims(query, found, host, asked, missing)
        present = frozenset(shard.root for number, shard in enumerate(self.shards) if number not in missing)
        return Answer(self, host, claims, present)

    def _claims(
        self,
        query: int,
        found: memory_pb2.Found,
        host: PeerID,
        asked: Sequence[frozenset[int]],
        missing: Collection[int],
    ) -> list[Claim]:
        count = len(found.scores)
        if count > self.k or not len(found.shards) == len(found.positions) == count:
            raise WireError(f"a search for {self.k} passages with {count} scores, or not as many places")
        if len(found.leaves) != LEAF_PREFIX_BYTES * count:
            raise WireError(f"{len(found.leaves)} bytes of hashes for {count} passages")
        claims = []
        places = set()
        last: int | None = None
        for n, (number, position, score) in enumerate(
            zip(found.shards, found.positions, found.scores, strict=True)
        ):
            if number >= len(self.shards) or number in missing or query not in asked[number]:
                raise WireError("a passage of a shard in which its query was not looked up")
            shard = self.shards[number]
            if position >= shard.leaves or (number, position) in places:
                raise WireError("a passage that the shard does not have, or the same one twice")
            if last is not None and score > last:
                raise WireError("passages that are not in the order of their scores")
            last = score
            places.add((number, position))
            leaf = found.leaves[LEAF_PREFIX_BYTES * n : LEAF_PREFIX_BYTES * (n + 1)]
            claims.append(Claim(score, leaf, Place(shard.root, position), host))
        return claims


@dataclass(frozen=True)
class Answer:
    """What a host answered to a search."""

    ask: Ask
    host: PeerID
    claims: Mapping[int, Sequence[Claim]]
    """Of each query, best first."""
    present: frozenset[bytes]
    """Roots of the shards that are there."""

    def looked_up(self, query: int) -> frozenset[bytes]:
        """The shards in which this answer should have the query's best passages."""
        return frozenset(
            shard.root
            for shard, queries in zip(self.ask.shards, self.ask.queries, strict=True)
            if query in queries and shard.root in self.present
        )


@dataclass(frozen=True, eq=False)
class Proven:
    """A passage that lies in the memory, by its proof. It may have been revoked."""

    passage: Passage
    vector_D: Vectors
    leaf: bytes
    reader: PeerID
    """Who gave it."""

    def score(self, query_D: Vectors) -> int:
        return int(query_D.astype(np.int32) @ self.vector_D.astype(np.int32))


def parse_passages(
    reply: memory_pb2.ReadReply,
    asked: Mapping[bytes, Collection[int]],
    manifest: MemoryManifest,
    host: PeerID,
) -> dict[Place, Proven]:
    """The passages that were read, as far as the host has them.

    `asked`: positions by root, in the order of the request. Raises WireError if no honest host answers so.
    """
    roots = list(asked)
    wanted = {Place(root, position) for root, positions in asked.items() for position in positions}
    if len(reply.passages) > len(wanted):
        raise WireError(f"{len(wanted)} passages were asked for, and {len(reply.passages)} came")
    found = {}
    for message in reply.passages:
        if message.shard >= len(roots):
            raise WireError("a passage of a shard that was not asked for")
        place = Place(roots[message.shard], message.position)
        if place not in wanted:
            raise WireError("a passage that was not asked for, or the same one twice")
        wanted.remove(place)
        if message.HasField("passage"):
            found[place] = _prove(message, place, manifest, host)
    return found


def _prove(message: memory_pb2.ProvenPassage, place: Place, manifest: MemoryManifest, host: PeerID) -> Proven:
    if len(message.vector) != manifest.dimensions:
        raise WireError(f"a vector of {len(message.vector)} bytes; expected {manifest.dimensions}")
    passage, leaf = prove(message, manifest.by_root[place.root])
    assert passage is not None, "revoked ones are left out before"
    return Proven(passage, np.frombuffer(message.vector, np.int8), leaf, host)


class Findings:
    """All that is said about the queries of one search, and what of it is proven."""

    def __init__(self, manifest: MemoryManifest, vectors_QD: Vectors, k: int) -> None:
        """`k`: how many passages each query is to have."""
        self.proven: dict[Place, Proven] = {}
        self.liars: set[PeerID] = set()
        """Hosts that claimed what is not so."""
        self._vectors_QD = vectors_QD
        self._k = k
        self._revoked = manifest.revoked_prefixes
        self._claims: list[list[Claim]] = [[] for _ in vectors_QD]
        self._unreadable: set[Place] = set()
        self._true: set[tuple[int, Claim]] = set()

    def add(self, answer: Answer) -> None:
        for query, claims in answer.claims.items():
            self._claims[query] += claims

    def prove(self, passages: Mapping[Place, Proven]) -> None:
        self.proven |= passages

    def give_up(self, places: Iterable[Place]) -> None:
        """Nobody gives the passages at these places."""
        self._unreadable.update(places)

    def best(self, query: int) -> list[Claim]:
        """The query's best passages by the claims that may still be true, each once.

        Notes the hosts of claims that are not true, as far as the passages are proven.
        """
        while True:
            ranked = self._ranked(query)
            known = len(self.liars)
            for claim in ranked:
                proven = self.proven.get(claim.place)
                if proven is not None and not self._is_true(query, claim, proven):
                    self.liars.add(claim.host)
            if len(self.liars) == known:
                return ranked

    def unproven(self) -> dict[Place, list[PeerID]]:
        """The places that must be read before the best passages of all queries are known, and who claims them.

        Hosts that lied are noted, and what they claim is not read.
        """
        wanted: dict[Place, list[PeerID]] = {}
        for query in range(len(self._claims)):
            for claim in self.best(query):
                if claim.place not in self.proven:
                    wanted.setdefault(claim.place, []).append(claim.host)
        return wanted

    def results(self, query: int) -> list[tuple[int, Proven]]:
        """The query's best passages that are proven, and their scores. None is revoked: no such claim is considered."""
        best = ((claim, self.proven.get(claim.place)) for claim in self.best(query))
        return [(claim.score, proven) for claim, proven in best if proven is not None]

    def _ranked(self, query: int) -> list[Claim]:
        fit = [
            claim
            for claim in self._claims[query]
            if claim.host not in self.liars
            and claim.place not in self._unreadable
            and claim.leaf not in self._revoked
        ]
        # of several places of one passage rather one that needs no reading
        fit.sort(key=lambda claim: (-claim.score, claim.leaf, claim.place not in self.proven, claim.place))
        ranked: list[Claim] = []
        leaves: set[bytes] = set()
        for claim in fit:
            if claim.leaf not in leaves:
                leaves.add(claim.leaf)
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


def agrees(claim: Claim, proven: Proven, query_D: Vectors) -> bool:
    """Whether what was claimed is so, by the passage that lies at that place."""
    return proven.leaf[:LEAF_PREFIX_BYTES] == claim.leaf and proven.score(query_D) == claim.score


def omitted(query: int, one: Answer, other: Answer) -> list[Claim]:
    """The claims of `one` that `other` should have made, and has not. They still have to be proven.

    Compares the shards in which both looked the query up. Of equal scores either passage may be the last one.
    """
    shared = one.looked_up(query) & other.looked_up(query)
    theirs = other.claims.get(query, ())
    said = {(claim.leaf, claim.score) for claim in theirs}
    is_full = len(theirs) >= other.ask.k
    return [
        claim
        for claim in one.claims.get(query, ())
        if claim.place.root in shared
        and (claim.leaf, claim.score) not in said
        and not (is_full and claim.score <= theirs[-1].score)
    ]
