"""`talkoot memory revoke`: a new revision of a memory without some passages, which its hosts then delete."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from dht.announcements import NodeInfo
from dht.library import LibraryEntry, MemoryRegistry, with_entry
from dht.memory import Place
from dht.swarm import Swarm
from expert_server.memory.store import MemoryStore
from expert_server.settings import NodeSettings
from peer import clock
from peer.errors import LibraryError, StateError, TransferError, WireError
from peer.formatting import counted, printable
from peer.identity import PeerID
from peer.loop import new_loop, side_by_side
from peer.rpc.parts import check_sha256
from talkoot.memory.build import was_never_published
from talkoot.memory.inspection import open_memory
from talkoot.memory.publish import Publication, look_until_done
from talkoot.memory.publishers import Publisher, publisher_of
from talkoot.memory.selection import FEWEST_DIGITS, Selected, Selection
from talkoot.node.launch import listen_address
from talkoot.signals import run_until_stopped
from talkoot.terminal import Terminal

logger: logging.Logger = logging.getLogger(__name__)

_SHOWN = 20
_LABEL_CHARACTERS = 100
_MOST_NAMED = 8
"""The most hosts that are named."""
_ANSWER_S, _ASKED_AT_ONCE = 120.0, 8
"""The deadline for a host to send the manifest, and how many hosts are asked at the same time."""


def run_revoke(
    terminal: Terminal,
    folder: Path,
    selection: Selection,
    join: str | None,
    state: Path | None,
    settings: NodeSettings,
    *,
    only_show: bool = False,
) -> None:
    """Returns once all hosts have deleted the passages. `only_show`: revokes nothing. Without `join`, a memory that was
    never published is only changed in its folder. Raises UserError and Stopped.
    """
    with terminal.stages("reading the memory") as stage:
        store = open_memory(folder, stage if terminal.live else lambda text: None)
        found = selection.find(store)
    _show(terminal, store, found)
    if only_show:
        return
    if join is None and was_never_published(folder):
        _remove(terminal, store, found)
        return
    with (
        publisher_of(join, state) as publisher,
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        host = listen_address(settings, publisher.invite.bootstrap)
        runner.run(run_until_stopped(_revoke(terminal, publisher, store, found, settings, host)))


def _show(terminal: Terminal, store: MemoryStore, found: Mapping[Place, Selected]) -> None:
    if terminal.json:
        passages = [
            {
                "hash": each.leaf.hex(),
                "title": each.passage.title,
                "source": each.passage.source,
                "text": each.passage.text,
            }
            for each in found.values()
        ]
        terminal.event("selected", {"passages": passages})
        return
    terminal.line(f"{counted(len(found), 'passage', ',')} of {store.manifest.name}:")
    for each in list(found.values())[:_SHOWN]:
        about = printable(f"{each.passage.title}, {each.passage.source}", _LABEL_CHARACTERS)
        cut = " (across two passages)" if each.is_cut else ""
        terminal.line(f"  {each.leaf.hex()[:FEWEST_DIGITS]}  {about}{cut}: {each.excerpt}")
    if len(found) > _SHOWN:
        terminal.line(f"  and {len(found) - _SHOWN:,} more")


def _remove(terminal: Terminal, store: MemoryStore, found: Mapping[Place, Selected]) -> None:
    """Takes passages out of a memory that nobody else has. Raises LibraryError."""
    _write(store, found)
    if terminal.json:
        values = {"folder": str(store.folder), "revision": store.manifest.revision, "passages": len(found)}
        terminal.event("removed", values)
        return
    terminal.line(
        f"removed {counted(len(found), 'passage', ',')} from {store.folder}; it was never published. If you published "
        "a copy of it, revoke them from there too"
    )


async def _revoke(
    terminal: Terminal,
    publisher: Publisher,
    store: MemoryStore,
    found: Mapping[Place, Selected],
    settings: NodeSettings,
    host: str,
) -> None:
    async with AsyncExitStack() as stack:
        with terminal.stages("making ready") as stage:
            swarm = await stack.enter_async_context(publisher.joined(settings, host, stage))
            libraries = await MemoryRegistry(swarm.registry).libraries()
            now = LibraryEntry.of(store.manifest, store.part, publisher.signer.peer_id)
            # nothing is written if the new revision can't be published
            with_entry(libraries.get(publisher.signer.peer_id, ()), now)
            stage("writing the new revision")
            await asyncio.to_thread(_write, store, found)
            publication = Publication(swarm, store, publisher, settings, host)
            await stack.enter_async_context(publication.published(stage))
        logger.info(
            "revision %d of %s is published: its hosts delete %s and refuse to serve %s",
            publication.entry.revision,
            publication.entry.memory,
            counted(len(found), "passage", ","),
            "it" if len(found) == 1 else "them",
        )
        watch = _FollowerWatch(terminal, swarm, publication)
        try:
            await watch.until_all_follow()
        except asyncio.CancelledError:
            logger.warning(
                "stopped: %s. The other hosts follow within two announcement periods if they can reach a host that has "
                "the revision. To continue, run `talkoot memory publish` with the same folder",
                watch.in_words,
            )
            raise


def _write(store: MemoryStore, found: Mapping[Place, Selected]) -> None:
    """Writes the next revision into the memory's folder. Raises LibraryError."""
    old = store.manifest
    new = replace(
        old, revision=old.revision + 1, created_at=clock.now(), revoked=old.revoked | frozenset(found)
    )
    try:
        store.follow(new.serialize())
    except (OSError, WireError) as error:
        raise LibraryError(f"can't write the new revision into {store.folder}: {error}") from error


class _FollowerWatch:
    """Watches which hosts have the new revision."""

    def __init__(self, terminal: Terminal, swarm: Swarm, publication: Publication) -> None:
        self._terminal = terminal
        self._swarm = swarm
        self._publication = publication
        self._following: set[PeerID] = set()
        self._hosts: set[PeerID] = set()
        """The hosts of all looks, also if they have died since."""
        self._names: dict[PeerID, str] = {}

    @property
    def in_words(self) -> str:
        """How many hosts have deleted the passages, and which have not, as far as is known."""
        count, rest = len(self._hosts), self._unconfirmed
        done = f"{count - len(rest)} of {counted(count, 'host')} have deleted them"
        if not rest:
            return done
        named = ", ".join(host.with_name(self._names.get(host)) for host in rest[:_MOST_NAMED])
        more = f" and {len(rest) - _MOST_NAMED} more" if len(rest) > _MOST_NAMED else ""
        return f"{done}; no confirmation yet from {named}{more}"

    @property
    def _unconfirmed(self) -> list[PeerID]:
        return sorted(self._hosts - self._following)

    async def until_all_follow(self) -> None:
        with self._terminal.stages("waiting for its hosts") as show:
            await look_until_done(
                self._publication, self._look, lambda: self.in_words, self._terminal.live, show
            )
        entry = self._publication.entry
        if self._terminal.json:
            values = {
                "memory": str(entry.memory),
                "revision": entry.revision,
                "hosts": len(self._hosts),
                "unconfirmed": [host.to_base58() for host in self._unconfirmed],
            }
            self._terminal.event("revoked", values)
        elif self._hosts:
            self._terminal.line(f"done: {self.in_words}. Nodes that are away delete them when they return")
        else:
            self._terminal.line(
                "done: nobody hosts the memory now. Those who had it delete them when they return"
            )

    async def _look(self) -> bool:
        """Whether all hosts serve the new manifest, because those that do have deleted the passages revoked in it.
        Raises UnreachableError.
        """
        hosts = (await self._publication.announced()).hosts
        self._hosts |= hosts
        contacts = await self._swarm.registry.nodes(hosts - self._following)
        self._names |= {host: contact.name for host, contact in contacts.items()}
        await side_by_side((self._ask(contact) for contact in contacts.values()), _ASKED_AT_ONCE)
        return hosts <= self._following

    async def _ask(self, host: NodeInfo) -> None:
        memory, manifest = str(self._publication.entry.memory), self._publication.entry.manifest
        # a host that does not have the revision yet learns from the record that there is one
        library = self._publication.library
        with contextlib.suppress(TransferError, StateError, WireError, TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                data = await self._publication.parts.fetch(
                    host, memory, manifest.sha256, manifest.size, library
                )
            check_sha256(manifest.sha256, data)
            self._following.add(host.peer_id)
