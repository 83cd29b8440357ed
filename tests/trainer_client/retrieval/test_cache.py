"""Search results stay on disk, within a limit of bytes and only for the newest revision."""

import sqlite3
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.memory import Passage
from peer.wire.memory_pb2 import ProvenPassage, ReadReply
from trainer_client.retrieval.cache import NeighbourCache

PASSAGES = st.lists(
    st.builds(
        Passage,
        st.text(max_size=50),
        st.text(max_size=9),
        st.text(max_size=9),
        st.integers(0, 2**40),
        st.just("MIT"),
    ),
    max_size=4,
)


def passage(text: str) -> Passage:
    return Passage(text, "title", "source", 3, "CC0-1.0")


@given(st.dictionaries(st.text(max_size=20), PASSAGES, max_size=5))
@settings(max_examples=20)
def test_what_was_found_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, list[Passage]]
) -> None:
    path = tmp_path_factory.mktemp("cache") / "found"
    cache = NeighbourCache(path)
    cache.put("docs", 1, found)
    cache.close()
    cache = NeighbourCache(path)
    assert cache.get("docs", 1, [*found, "another"]) == found
    assert cache.get("docs", 2, list(found)) == cache.get("other", 1, list(found)) == {}
    cache.close()


def test_a_newer_revision_drops_what_was_found_in_earlier_ones(tmp_path: Path) -> None:
    cache = NeighbourCache(tmp_path / "found")
    cache.put("docs", 1, {"a": [passage("old")]})
    cache.put("birds", 1, {"a": [passage("kept")]})
    cache.put("docs", 2, {"b": [passage("new")]})
    assert cache.get("docs", 1, ["a"]) == {}
    assert cache.get("docs", 2, ["b"]) == {"b": [passage("new")]}
    assert cache.get("birds", 1, ["a"]) == {"a": [passage("kept")]}
    cache.close()


def test_earlier_revisions_are_looked_for_once(tmp_path: Path) -> None:
    cache, statements = NeighbourCache(tmp_path / "found"), list[str]()
    assert cache._connection is not None
    cache._connection.set_trace_callback(statements.append)
    for number in range(3):
        cache.put("docs", 1, {f"{number}": [passage("some")]})
    assert [statement.split()[0] for statement in statements] == ["DELETE", "INSERT", "INSERT", "INSERT"]
    cache.close()


def test_it_stays_within_its_bytes_and_keeps_the_newest(tmp_path: Path) -> None:
    path, limit = tmp_path / "found", 2**18
    cache = NeighbourCache(path, limit)
    texts = [f"chunk {number}" for number in range(400)]
    for number, text in enumerate(texts):
        # Data that does not compress well.
        words = " ".join(f"{hash((number, word)):x}" for word in range(120))
        cache.put("docs", 1, {text: [passage(words)]})
    assert path.stat().st_size <= limit
    found = cache.get("docs", 1, texts)
    assert texts[-1] in found
    assert texts[0] not in found
    cache.close()


def test_a_broken_file_is_begun_anew_and_a_place_that_can_not_be_written_costs_the_cache_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "found"
    path.write_bytes(b"no database at all" * 100)
    cache = NeighbourCache(path)
    cache.put("docs", 1, {"a": [passage("text")]})
    assert cache.get("docs", 1, ["a"]) == {"a": [passage("text")]}
    cache.close()
    nowhere = NeighbourCache(tmp_path / "missing" / "found")
    nowhere.put("docs", 1, {"a": [passage("text")]})
    assert nowhere.get("docs", 1, ["a"]) == {}
    nowhere.close()


def test_a_file_that_breaks_in_use_or_has_another_form_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "found"
    cache = NeighbourCache(path)
    texts = [f"chunk {number}" for number in range(500)]
    cache.put("docs", 1, {text: [passage(text * 50)] for text in texts})
    cache.close()
    data = bytearray(path.read_bytes())
    # The file's header and its list of tables are intact.
    data[2 * 4096 :] = bytes(len(data) - 2 * 4096)
    path.write_bytes(data)
    for _ in range(2):
        cache = NeighbourCache(path)
        cache.get("docs", 1, texts)
        cache.put("docs", 1, {"new": [passage("text")]})
        assert cache.get("docs", 1, ["new"]) == {"new": [passage("text")]}
        cache.close()
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE found (something)")
    other.close()
    cache = NeighbourCache(path)
    cache.put("docs", 1, {"new": [passage("text")]})
    assert cache.get("docs", 1, ["new"]) == {"new": [passage("text")]}
    cache.close()


@pytest.mark.parametrize(
    "stored",
    [
        b"not compressed",
        zlib.compress(b"[]"),
        zlib.compress(
            ReadReply(
                passages=[ProvenPassage(passage=passage("x" * 1000).message())] * 1500
            ).SerializeToString()
        ),
        zlib.compress(
            ReadReply(passages=[ProvenPassage(passage=passage("x" * 10**5).message())]).SerializeToString()
        ),
    ],
    ids=["plain", "another form", "far larger", "a long text"],
)
def test_an_entry_that_was_never_written_so_counts_as_not_found(tmp_path: Path, stored: bytes) -> None:
    path = tmp_path / "found"
    cache = NeighbourCache(path)
    cache.put("docs", 1, {"a": [passage("text")], "b": [passage("text")]})
    cache.close()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE found SET passages = ? WHERE rowid = 1", (stored,))
    other.close()
    cache = NeighbourCache(path)
    assert cache.get("docs", 1, ["a", "b"]) == {"b": [passage("text")]}
    cache.close()
