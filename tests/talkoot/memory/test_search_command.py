"""`talkoot search`, as users and programs call it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_samples import SampleMemory
from memory_swarm import MemorySwarm
from training_swarm import talkoot

from dht.memory import Passage
from peer.loop import LoopThread

LIMIT_S = 120.0
WORDS = SampleMemory.with_words()


@pytest.fixture(scope="module")
def swarm(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    folder = tmp_path_factory.mktemp("swarm")

    async def start(stack: contextlib.AsyncExitStack) -> MemorySwarm:
        swarm = await MemorySwarm.found(stack, folder, WORDS)
        await swarm.host()
        await swarm.host()
        return swarm

    stack = contextlib.AsyncExitStack()
    try:
        yield loop.run(start(stack), LIMIT_S)
    finally:
        loop.run(stack.aclose(), LIMIT_S)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def join(loop: LoopThread, swarm: MemorySwarm) -> str:
    return str(loop.run(swarm.invite(), LIMIT_S))


def test_passages_are_shown_with_their_sources_and_who_served_them(join: str) -> None:
    passage = WORDS.passages[7]
    ended = talkoot("search", "--join", join, "-k", 2, passage.text)
    assert ended.status == 0, ended.err
    first, about, *text = ended.out.splitlines()
    assert first == "1. title 7"
    assert about.startswith("   words.txt · CC0-1.0 · score ")
    assert " · served by host " in about
    shown = " ".join(" ".join(text[: text.index("")]).split())
    assert shown == passage.text
    assert "2 passages of memory docs-" in ended.out.splitlines()[-1]


def test_programs_get_one_json_object(swarm: MemorySwarm, join: str, tmp_path: Path) -> None:
    passage, vector_D = WORDS.passages[7], WORDS.vectors_ND[7]
    ended = talkoot("search", "--join", join, passage.text, "--memory", swarm.memory_id, "-k", 3, "--json")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert found["memory"] == str(swarm.memory_id)
    assert found["missing_cells"] == []
    assert len(found["passages"]) == 3
    first = found["passages"][0]
    assert first["text"] == passage.text
    assert (first["title"], first["source"], first["offset"]) == (
        passage.title,
        passage.source,
        passage.offset,
    )
    assert first["license"] == "CC0-1.0"
    assert first["hash"] == passage.leaf(vector_D.tobytes()).hex()
    assert first["served_by"] in {str(host.swarm.host.peer_id) for host in swarm.hosts}
    assert first["similarity"] == pytest.approx(1.0)
    assert len(list((tmp_path / "talkoot" / "memories").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["xyzzy plugh"], "knows no word of this question"),
        (["  "], "ask something"),
        (["a" * 10_001], "shorten it to 10000"),
        (["word1", "--memory", "dosc"], "pass one of docs-"),
    ],
)
def test_what_cannot_be_found_is_one_clear_line(join: str, arguments: list[str], said: str) -> None:
    talkoot("search", "--join", join, *arguments).is_one_clear_line(said)


def test_a_swarm_without_a_memory_or_without_its_hosts_says_what_to_do(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def start(stack: contextlib.AsyncExitStack) -> MemorySwarm:
        return await MemorySwarm.found(stack, tmp_path, WORDS)

    stack = contextlib.AsyncExitStack()
    try:
        swarm = loop.run(start(stack), LIMIT_S)
        join = str(loop.run(swarm.invite(), LIMIT_S))
        talkoot("search", "--join", join, "word1").is_one_clear_line(
            "no live host of memory docs-", "wait until"
        )
        loop.run(swarm.publish(), LIMIT_S)
        talkoot("search", "--join", join, "word1").is_one_clear_line(
            "no memory is published", "memory publish"
        )
    finally:
        loop.run(stack.aclose(), LIMIT_S)


def test_a_passage_cannot_write_to_the_terminal(loop: LoopThread, tmp_path: Path) -> None:
    evil = "\x1b[2J word1 \x1b]0;owned\x07 word2\r"
    memory = SampleMemory.with_words(passages=1, passage=Passage(evil, evil, evil, 0, evil))

    async def start(stack: contextlib.AsyncExitStack) -> MemorySwarm:
        swarm = await MemorySwarm.found(stack, tmp_path, memory)
        await swarm.host()
        return swarm

    stack = contextlib.AsyncExitStack()
    try:
        swarm = loop.run(start(stack), LIMIT_S)
        ended = talkoot("search", "--join", loop.run(swarm.invite(), LIMIT_S), "word1 word2")
        assert ended.status == 0, ended.err
        assert "word1" in ended.out
        assert not {"\x1b", "\x07", "\r"} & set(ended.out)
    finally:
        loop.run(stack.aclose(), LIMIT_S)
