"""`talkoot search`: finds passages in a memory of a swarm, and shows them with their sources."""

import textwrap
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import platformdirs

from dht.admission import Role
from dht.announcements import NodeInfo
from dht.memory import MAX_LABEL_CHARACTERS, MAX_LICENSE_CHARACTERS, MAX_TEXT_CHARACTERS, MemoryID, Passage
from dht.swarm import Swarm
from peer.errors import DataError, LibraryError
from peer.formatting import counted, printable
from talkoot.ephemeral import run_in_swarm
from talkoot.terminal import Terminal, to_json
from trainer_client.memory.memories import Memories
from trainer_client.memory.retriever import Hit, SearchResult, check_query

_CHANNELS = 64
_WIDEST = 100
"""The widest text, in columns."""
_INDENT = "   "


@dataclass(frozen=True)
class SearchRequest:
    """What to search for."""

    question: str
    memory: str | None
    """The memory's name or id; None: the only one of the swarm."""
    k: int
    cells: int


@dataclass(frozen=True)
class _Answer:
    """The results of a search, and the memory they are from."""

    memory: MemoryID
    result: SearchResult
    nodes: Collection[NodeInfo]
    seconds: float
    """The duration of the search alone, in seconds."""


def run_search(terminal: Terminal, join: str | None, request: SearchRequest) -> None:
    """Prints the passages. Raises UserError if none can be found."""
    if not request.question.strip():
        raise DataError('ask something, such as: talkoot search --join INVITE "how are lists sorted?"')
    check_query([request.question], request.k, request.cells)
    answer = run_in_swarm(terminal, join, lambda swarm: _search(terminal, swarm, request), tuple(Role))
    check_found(answer.memory, answer.result)
    if terminal.json:
        terminal.line(to_json(_to_dict(request, answer)))
    else:
        _show(terminal, answer)


async def _search(terminal: Terminal, swarm: Swarm, request: SearchRequest) -> _Answer:
    with terminal.stages("opening the memory") as stage:
        channels = swarm.host.channels(_CHANNELS)
        memories = Memories(swarm, channels, platformdirs.user_cache_path("talkoot") / "memories")
        try:
            retriever = await memories.open(request.memory, stage)
            stage(f"searching {retriever.directory.memory}")
            began = time.monotonic()
            (result,) = await retriever.search([request.question], request.k, request.cells)
            seconds = time.monotonic() - began
            return _Answer(retriever.directory.memory, result, retriever.directory.nodes, seconds)
        finally:
            await memories.close()
            await channels.close()


def check_found(memory: MemoryID, result: SearchResult) -> None:
    """Raises UserError if nothing was found."""
    check_hosts(memory, result)
    if (why := why_nothing(memory, result)) is not None:
        raise DataError(f"nothing found: {why}")


def check_hosts(memory: MemoryID, result: SearchResult) -> None:
    """Raises LibraryError if nothing was found because nobody answered."""
    if result.is_understood and not result.hits and result.missing:
        raise LibraryError(
            f"no live host of memory {memory} answered: wait until a node that hosts it is back; "
            "`talkoot memory list` shows how many hosts there are"
        )


def why_nothing(memory: MemoryID, result: SearchResult) -> str | None:
    """Why there are no passages, for the user; None if there are some."""
    if not result.is_understood:
        return f"memory {memory} knows no word of this question; ask in the words and the language of its passages"
    return None if result.hits else f"memory {memory} has no passages near this question"


def _show(terminal: Terminal, answer: _Answer) -> None:
    names = {node.peer_id: node.name for node in answer.nodes if node.name}
    width = min(terminal.out.width, _WIDEST)
    for number, hit in enumerate(answer.result.hits, 1):
        title, source, license = _labels(hit.passage)
        terminal.line(f"{number}. {title}")
        about = (
            source,
            license,
            f"score {hit.score:.3f}",
            f"served by {names.get(hit.served_by, hit.served_by)}",
        )
        terminal.line(_INDENT + " · ".join(text for text in about if text))
        text = printable(hit.passage.text, MAX_TEXT_CHARACTERS)
        terminal.line(textwrap.fill(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT) + "\n")
    missing = len(answer.result.missing)
    gap = f"; nobody answered for {counted(missing, 'cell')} near the question" if missing else ""
    found = counted(len(answer.result.hits), "passage")
    terminal.line(f"{found} of memory {answer.memory} in {answer.seconds:.2f} s{gap}")


def citation(passage: Passage) -> str:
    """The title, source and licence, for people."""
    title, source, license = _labels(passage)
    return f"{title} ({source}, {license})"


def _labels(passage: Passage) -> tuple[str, str, str]:
    return (
        printable(passage.title, MAX_LABEL_CHARACTERS) or "(no title)",
        printable(passage.source, MAX_LABEL_CHARACTERS),
        printable(passage.license, MAX_LICENSE_CHARACTERS) or "licence not given",
    )


def _to_dict(request: SearchRequest, answer: _Answer) -> dict[str, Any]:
    return {
        "question": request.question,
        "memory": str(answer.memory),
        "seconds": answer.seconds,
        "missing_cells": [list(cell) for cell in answer.result.missing],
        "passages": [hit_dict(hit) for hit in answer.result.hits],
    }


def hit_dict(hit: Hit) -> dict[str, Any]:
    passage = hit.passage
    return {
        "title": passage.title,
        "source": passage.source,
        "offset": passage.offset,
        "license": passage.license,
        "text": passage.text,
        "score": hit.score,
        "similarity": hit.similarity,
        "hash": hit.leaf.hex(),
        "served_by": str(hit.served_by),
    }
