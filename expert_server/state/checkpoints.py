"""Checkpoints: the states of experts on disk, from which a node that restarts resumes.

`CheckpointStore` is the folder: it knows files, not experts in service. `Checkpoints` is the shell around it: it saves
and restores the experts of a runtime without delaying their work.
"""

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from prometheus_client import CollectorRegistry, Counter

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.devices import first_line
from expert_server.experts.expert import Expert
from expert_server.experts.format import AVERAGED, OWN_SOURCES, Checkpoint, StateForm, from_bytes, to_bytes
from expert_server.serving.runtime import Runtime
from peer.bounded import BoundedDict
from peer.checkpoints import RotatingFiles, read_checkpoint
from peer.errors import ExpertError, StateError, WireError
from peer.formatting import counted

logger: logging.Logger = logging.getLogger(__name__)

MAX_SOURCES = 4
"""How many other peers' states of one expert are kept."""
_OLD_S = 7 * 86400.0
"""After this many seconds, a state of one peer may be replaced by that of a fifth peer."""
_SOURCE = re.compile(rf"{AVERAGED}|[1-9A-HJ-NP-Za-km-z]{{2,64}}")
"""A PeerID, or the name of averages."""
_REFUTED = 1024
MAX_GIVEN_UP = 16
"""Of how many experts that this node gave up, because others proved to have them, the checkpoints are kept. Strangers
can make a node give up one expert after the other.
"""
_GIVEN_UP = "given_up"
"""The file that marks the checkpoints of such an expert."""


class Entry(NamedTuple):
    """One checkpoint of an expert, as its path describes it."""

    update_count: int
    source: str
    """See `Checkpoint.source`."""


class CheckpointStore:
    """The checkpoints of a swarm's experts: `<folder>/<swarm_id>/<uid>/<update_count>.safetensors`.

    States that other peers gave have separate folders until they are proven: `<uid>/<source>/`, with the last state of
    each source. So none of them displaces what this node trained, or another source's state. There are at most
    `MAX_SOURCES` for each expert.

    Files are written atomically: under another name, synced, and renamed. One process at a time may use the folder,
    from any thread.
    """

    def __init__(
        self,
        folder: Path,
        swarm_id: str,
        manifest: Manifest,
        keep: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`keep`: how many checkpoints of each expert to keep, apart from those of other sources."""
        self._folder = folder / swarm_id
        self._swarm_id = swarm_id
        self._keep = keep
        self._now = now
        self._holds = manifest.holds
        self._form = StateForm.of(manifest)
        self._strays: set[UID] = set()
        self._writing = threading.Lock()

    def sweep(self) -> None:
        """Removes what killed writers left behind."""
        for pattern in ("*/", "*/*/"):
            for path in self._folder.glob(pattern):
                RotatingFiles(path, self._keep).sweep()

    def newest(self) -> dict[UID, dict[str, int]]:
        """The update count of each expert's newest checkpoint from each source, according to the file names."""
        try:
            names = os.listdir(self._folder)
        except OSError:
            return {}
        found = {}
        for name in names:
            with suppress(WireError):  # not a folder of a checkpoint
                uid = UID.parse(name)
                if not self._holds(uid):
                    self._pass_over_stray(uid)
                elif entries := self.entries(uid):
                    found[uid] = {entry.source: entry.update_count for entry in reversed(entries)}
        return found

    def _pass_over_stray(self, uid: UID) -> None:
        """Warns once. Either the swarm was founded again with another grid, or the folder belongs to another swarm."""
        if uid not in self._strays:
            self._strays.add(uid)
            logger.warning(
                "skipping the checkpoints in %s: the swarm's grid has no such expert",
                self._folder / str(uid),
            )

    def entries(self, uid: UID) -> list[Entry]:
        """An expert's checkpoints, newest first, according to the file names."""
        try:
            names = os.listdir(self._folder / str(uid))
        except OSError:
            return []
        found = [
            Entry(number, source)
            for source in ("", *filter(_SOURCE.fullmatch, names))
            for number in self._files(uid, source).numbers()
        ]
        return sorted(found, key=lambda entry: (-entry.update_count, entry.source))

    def path(self, uid: UID, update_count: int, source: str = "") -> Path:
        return self._files(uid, source).path(update_count)

    def save(self, uid: UID, checkpoint: Checkpoint) -> None:
        """Returns when the checkpoint is safely on disk.

        Raises OSError, and StateError if states of too many other sources are kept. All earlier checkpoints are then
        still there.
        """
        data = to_bytes(checkpoint, self._swarm_id, uid, self._now())
        source, displaced = checkpoint.source, None
        with self._writing:
            if source in OWN_SOURCES:
                self._unmark(uid)
            else:  # a copy of what another peer serves does not make this node's own states needed
                displaced = self._displaced(uid, source)
            files = self._files(uid, source)
            files.write(checkpoint.update_count, data)
            if source:
                files.remove(number for number in files.numbers() if number != checkpoint.update_count)
            if displaced is not None:
                self._remove_source(uid, displaced)

    def load_newest(self, uid: UID, entries: Iterator[Entry] | None = None) -> Checkpoint | None:
        """The newest valid checkpoint, or the first valid one of `entries`; None if there is none.

        Others are skipped, and the log says why.
        """
        for entry in self.entries(uid) if entries is None else entries:
            try:
                return self._read(uid, entry)
            except StateError as error:
                self.pass_over(uid, entry, error)
        return None

    def _read(self, uid: UID, entry: Entry) -> Checkpoint:
        """Raises StateError if the file does not match its path, or was changed."""
        data = read_checkpoint(self.path(uid, *entry), self._form.max_bytes)
        checkpoint = from_bytes(data, self._swarm_id, uid, entry.update_count, self._form)
        return replace(checkpoint, source=entry.source)

    def pass_over(self, uid: UID, entry: Entry, reason: StateError) -> None:
        """Logs a warning. The file stays, for people to look at, until newer ones replace it."""
        logger.warning("skipping the checkpoint %s: %s", self.path(uid, *entry), reason)

    def give_up(self, uids: Iterable[UID], needed: Collection[UID], keep: int = MAX_GIVEN_UP) -> None:
        """Marks experts that others have proved to have. Removes the checkpoints of all marked experts but the last
        `keep`. Those of `needed` ones stay, and so do those of experts that this node lost in any other way: they may
        be the only ones. Raises OSError.
        """
        with self._writing:
            for uid in uids:
                if self.entries(uid):
                    self._mark(uid).write_bytes(b"")
            marked: list[tuple[int, UID]] = []
            for uid in self.newest():
                with suppress(FileNotFoundError):
                    marked.append((self._mark(uid).stat().st_mtime_ns, uid))
            for _, uid in sorted(marked, reverse=True)[keep:]:
                if uid not in needed:
                    self._remove(uid)

    def drop(self, uid: UID) -> None:
        """Removes what other peers gave of an expert, unless this node has had a state of its own. Raises OSError."""
        with self._writing:
            if not any(entry.source in OWN_SOURCES for entry in self.entries(uid)):
                self._remove(uid)

    def take_back(self, uid: UID) -> None:
        """Call it when an expert continues from its checkpoint. Raises OSError."""
        with self._writing:
            self._unmark(uid)

    def _mark(self, uid: UID) -> Path:
        return self._folder / str(uid) / _GIVEN_UP

    def _unmark(self, uid: UID) -> None:
        if (mark := self._mark(uid)).exists():
            mark.unlink()

    def _remove(self, uid: UID) -> None:
        """Removes all checkpoints of an expert. Other files in its folders stay."""
        for entry in self.entries(uid):
            files = self._files(uid, entry.source)
            files.remove([entry.update_count])
            if entry.source:
                with suppress(OSError):
                    files.folder.rmdir()
        self._unmark(uid)
        with suppress(OSError):
            (self._folder / str(uid)).rmdir()

    def remove_averaged(self, uid: UID) -> None:
        """Removes states that were saved between an average that turned bad and the rollback."""
        files = self._files(uid, AVERAGED)
        with self._writing:
            files.remove(files.numbers())

    def _displaced(self, uid: UID, source: str) -> str | None:
        """The source whose states a state of this source displaces, if any. Raises StateError if each of them may be
        the only good one.
        """
        entries = self.entries(uid)
        others = {e.source: e.update_count for e in entries if e.source not in (*OWN_SOURCES, source)}
        if len(others) < MAX_SOURCES:
            return None
        proven = max((entry.update_count for entry in entries if not entry.source), default=-1)
        able = {s: n for s, n in others.items() if n <= proven or self._is_old(self.path(uid, n, s))}
        if not able:
            raise StateError(
                f"{len(others)} states of expert {uid} from other peers are already kept, and may be needed"
            )
        return min(able, key=able.__getitem__)

    def _remove_source(self, uid: UID, source: str) -> None:
        files = self._files(uid, source)
        files.remove(files.numbers())
        with suppress(OSError):  # it contains other files
            files.folder.rmdir()

    def _is_old(self, path: Path) -> bool:
        try:
            return self._now() - path.stat().st_mtime > _OLD_S
        except OSError:
            return False

    def _files(self, uid: UID, source: str = "") -> RotatingFiles:
        return RotatingFiles(self._folder / str(uid) / source, 1 if source else self._keep)


class Checkpoints:
    """Saves and restores the experts of a runtime: tensors on its compute thread, files on other threads."""

    def __init__(
        self, store: CheckpointStore, runtime: Runtime, metrics: CollectorRegistry | None = None
    ) -> None:
        self.saved: Counter = Counter("talkoot_checkpoints_saved", "Checkpoints written.", registry=metrics)
        self.failed: Counter = Counter(
            "talkoot_checkpoint_failures", "Checkpoints that could not be written.", registry=metrics
        )
        self.restored: Counter = Counter(
            "talkoot_experts_restored", "Experts that went on from a checkpoint.", registry=metrics
        )
        self.refuted: Counter = Counter(
            "talkoot_states_refuted",
            "States of other nodes that turned bad here while they were on probation.",
            registry=metrics,
        )
        self._store = store
        self._runtime = runtime
        self._on_disk: dict[UID, tuple[Entry, int, object]] = {}
        """For each expert, the checkpoint it was last saved as or restored from, and the accumulated rows and the
        generation at that time.
        """
        self._refuted = BoundedDict[tuple[UID, str], None](_REFUTED)
        """The sources whose states turned bad."""

    async def open(self) -> None:
        """Tidies the folder."""
        await asyncio.to_thread(self._store.sweep)

    async def newest(self) -> dict[UID, int]:
        """The update count of each expert's newest checkpoint, not yet verified."""
        return {uid: max(counts.values()) for uid, counts in (await self.newest_by_source()).items()}

    async def newest_by_source(self) -> dict[UID, dict[str, int]]:
        """The update counts of each expert's newest checkpoints, by source and not yet verified. The sources of this
        node's own states are `OWN_SOURCES`.
        """
        return await asyncio.to_thread(self._store.newest)

    async def restore(self, expert: Expert) -> bool:
        """Loads the newest valid checkpoint into an expert that does not serve yet. Returns whether there was one.

        If another peer gave that state, the expert returns to this node's own newest state if it turns bad.
        """
        entries = await asyncio.to_thread(self._store.entries, expert.uid)
        restored = await self._import_first(expert, (entry for entry in entries if not entry.source))
        least = expert.update_count if restored else -1
        others = (entry for entry in entries if entry.source and entry.update_count > least)
        return await self._import_first(expert, others) or restored

    async def _import_first(self, expert: Expert, entries: Iterable[Entry]) -> bool:
        """Imports the first state that is valid and plausible. Returns whether there was one."""
        uid = expert.uid
        left = iter([entry for entry in entries if (uid, entry.source) not in self._refuted])
        while checkpoint := await asyncio.to_thread(self._store.load_newest, uid, left):
            entry = Entry(checkpoint.update_count, checkpoint.source)
            try:
                generation = await self._runtime.run(partial(_import, expert, checkpoint))
            except StateError as error:
                self._store.pass_over(uid, entry, error)
            else:
                self._on_disk[uid] = entry, checkpoint.accumulated_rows, generation
                with suppress(OSError):
                    await asyncio.to_thread(self._store.take_back, uid)
                return True
        return False

    async def _recover(self, expert: Expert) -> None:
        """Call it after a state from another peer turned bad, and the previous state was restored and saved. If the bad
        state was not an average, another peer's state on this disk may be the right one.
        """
        uid, source, expert.refuted = expert.uid, expert.refuted, ""
        self.refuted.inc()
        logger.warning(
            "expert %s turned bad with the state of %s, and returned to its previous state", uid, source
        )
        if source == AVERAGED:
            await asyncio.to_thread(self._store.remove_averaged, uid)
            return
        self._refuted[uid, source] = None
        entries = await asyncio.to_thread(self._store.entries, uid)
        others = (e for e in entries if e.source not in OWN_SOURCES and e.update_count > expert.update_count)
        if await self._import_first(expert, others):
            logger.info("expert %s continues from the state of %s", uid, expert.source)

    async def keep(self, uid: UID, checkpoint: Checkpoint) -> None:
        """Saves the state of an expert that is served elsewhere. Raises OSError and StateError as `save` does."""
        await asyncio.to_thread(self._store.save, uid, checkpoint)

    async def drop(self, uid: UID) -> None:
        """Removes the copies of an expert that needs none. If this node has a state of its own, all stay."""
        try:
            await asyncio.to_thread(self._store.drop, uid)
        except OSError as error:
            logger.warning("could not remove the copy of expert %s: %s", uid, error.strerror or error)
        self._on_disk.pop(uid, None)  # if it was restored at the same moment, it is saved anew

    async def give_up(self, uids: Collection[UID], needed: Collection[UID]) -> None:
        """Call it when experts were given up, and saved, because others proved to have them. `needed`: experts whose
        checkpoints may be the only ones.
        """
        try:
            await asyncio.to_thread(self._store.give_up, uids, {*self._runtime.experts, *needed})
        except OSError as error:
            logger.warning("could not remove old checkpoints: %s", error.strerror or error)

    async def save_every(self, seconds: float) -> None:
        """Saves what has changed, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.save_changed()

    async def save_changed(self, experts: Collection[Expert] | None = None) -> None:
        """Saves the experts that have changed since they were last saved: of `experts`, or of all in service.

        One by one. A failed save is tried again next time.
        """
        failures: list[tuple[UID, Exception]] = []
        for expert in list(self._runtime.experts.values() if experts is None else experts):
            try:
                if self._is_changed(expert):
                    await self._save(expert)
                if expert.refuted:
                    await self._recover(expert)
            except ExpertError:
                return  # the runtime has stopped
            except (StateError, OSError, torch.AcceleratorError) as error:  # the last: its GPU has failed
                failures.append((expert.uid, error))
        if failures:
            self.failed.inc(len(failures))
            uid, reason = failures[0]
            logger.warning(
                "could not save %s, such as %s: %s; earlier checkpoints of them, if any, stay",
                counted(len(failures), "expert"),
                uid,
                reason.strerror if isinstance(reason, OSError) and reason.strerror else first_line(reason),
            )

    async def _save(self, expert: Expert) -> None:
        """Raises ExpertError, StateError or OSError."""
        checkpoint, generation = await self._runtime.run(lambda: (expert.checkpoint(), expert.generation))
        await asyncio.to_thread(self._store.save, expert.uid, checkpoint)
        self.saved.inc()
        entry = Entry(checkpoint.update_count, checkpoint.source)
        self._on_disk[expert.uid] = entry, checkpoint.accumulated_rows, generation

    async def save_all_within(self, seconds: float, experts: Collection[Expert]) -> None:
        """Saves what has changed, or as much of it as there is time for. Waits for a batch of theirs that is being
        computed, so that its updates are saved too.
        """
        try:
            async with asyncio.timeout(seconds):
                with suppress(ExpertError):  # the runtime has stopped
                    await self._runtime.run(lambda: None)
                await self.save_changed(experts)
        except TimeoutError:
            left = sum(map(self._is_changed, experts))
            logger.warning(
                "no time to save %s; earlier checkpoints of them, if any, stay", counted(left, "expert")
            )

    def _is_changed(self, expert: Expert) -> bool:
        """Whether it took updates since it was last saved, or its state was replaced or rolled back, even to one with
        the same update count. Initial parameters follow from the manifest, and are never saved.
        """
        rows = expert.accumulated_rows
        now = Entry(expert.update_count, expert.source), rows, expert.generation
        return bool(expert.update_count or rows) and now != self._on_disk.get(expert.uid)


def _import(expert: Expert, checkpoint: Checkpoint) -> object:
    """Returns the expert's generation with this state. Raises StateError."""
    expert.import_state(checkpoint.state, checkpoint.update_count, checkpoint.source)
    return expert.generation
