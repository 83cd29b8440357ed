"""Shards of arbitrary passages, for tests."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from memory_folders import shard_info

from dht.memory import Passage, Place, ShardInfo, Vectors
from expert_server.memory.shard import PrimaryShard, SecondaryShard, Shard

LABELS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PASSAGES = st.builds(
    Passage,
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    title=LABELS,
    source=LABELS,
    offset=st.integers(0, 2**40),
    license=LABELS,
)


def opened(data: bytes, passages: list[Passage], vectors: Vectors) -> PrimaryShard:
    shard = Shard.parse(data, shard_info(data, passages, vectors), vectors.shape[1])
    assert isinstance(shard, PrimaryShard)
    return shard


@st.composite
def shards(draw: st.DrawFn) -> tuple[list[Passage], Vectors]:
    passages = draw(st.lists(PASSAGES, min_size=1, max_size=5))
    # There are several blocks; the last may have any size.
    passages = passages * draw(st.integers(1, 30))
    dimensions = draw(st.integers(1, 9))
    return passages, draw(arrays.arrays(np.int8, (len(passages), dimensions)))


def secondary(root: bytes, vectors: Vectors) -> tuple[Shard, ShardInfo]:
    """A shard of the same passages in another cell."""
    data = SecondaryShard.build([Place(root, position) for position in range(len(vectors))], vectors)
    info = ShardInfo((1,), SecondaryShard.root_of(data), len(vectors), len(data), is_secondary=True)
    return Shard.parse(data, info, vectors.shape[1]), info
