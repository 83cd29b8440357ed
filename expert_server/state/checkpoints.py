"""Checkpoints: the states of experts on disk, from which a node that restarts resumes.

`CheckpointStore` is the folder: it knows files, and nothing of experts in service. `Checkpoints` is the shell around
it: it saves and restores the experts of a runtime without delaying what they compute.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import Checkpoint, StateForm, from_bytes, to_bytes
from expert_server.serving.runtime import Runtime
from peer.checkpoints import RotatingFiles, read_checkpoint
from peer.errors import ExpertError, StateError, WireError
from peer.formatting import counted

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of a swarm's experts: `<folder>/<swarm_id>/<uid>/<update_count>.safetensors`.

    A file is whole or not there: it is written under another name, synced, and renamed. One process at a time may use
    the folder, from any thread.
    """

    def __init__(
        self,
        folder: Path,
        swarm_id: str,
        manifest: Manifest,
        keep: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`keep`: how many checkpoints of each expert stay."""
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
        for path in self._folder.glob("*/"):
            RotatingFiles(path, self._keep).sweep()

    def newest(self) -> dict[UID, int]:
        """The update count of each expert's newest checkpoint, read from the file names alone."""
        try:
            names = os.listdir(self._folder)
        except OSError:
            return {}
        found = {}
        for name in names:
            with suppress(WireError):  # not a folder of ours
                uid = UID.parse(name)
                if not self._holds(uid):
                    self._pass_over_stray(uid)
                elif counts := self.update_counts(uid):
                    found[uid] = counts[0]
        return found

    def _pass_over_stray(self, uid: UID) -> None:
        """Warns once. Either the swarm was founded again with another grid, or the folder is another swarm's."""
        if uid not in self._strays:
            self._strays.add(uid)
            logger.warning(
                "passing over the checkpoints in %s: the swarm's grid has no such expert",
                self._folder / str(uid),
            )

    def update_counts(self, uid: UID) -> list[int]:
        """The update counts of an expert's checkpoints, newest first, read from the file names alone."""
        return self._files(uid).numbers()

    def path(self, uid: UID, update_count: int) -> Path:
        return self._files(uid).path(update_count)

    def save(self, uid: UID, checkpoint: Checkpoint) -> None:
        """Returns when the checkpoint is safely on disk. Raises OSError, and then keeps the earlier checkpoints."""
        data = to_bytes(checkpoint, self._swarm_id, uid, self._now())
        with self._writing:
            self._files(uid).write(checkpoint.update_count, data)

    def load_newest(self, uid: UID, below: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that is valid, and has fewer than `below` updates if given.

        Others are passed over, with a line in the log that says why.
        """
        for update_count in self.update_counts(uid):
            if below is None or update_count < below:
                try:
                    return self._load(uid, update_count)
                except StateError as error:
                    self.pass_over(uid, update_count, error)
        return None

    def pass_over(self, uid: UID, update_count: int, reason: StateError) -> None:
        """Warns. The file stays, for people to look at, until newer ones replace it."""
        logger.warning("passing over the checkpoint %s: %s", self.path(uid, update_count), reason)

    def _load(self, uid: UID, update_count: int) -> Checkpoint:
        """Raises StateError if the file is not what its path says, or not as it was written."""
        data = read_checkpoint(self.path(uid, update_count), self._form.max_bytes)
        return from_bytes(data, self._swarm_id, uid, update_count, self._form)

    def _files(self, uid: UID) -> RotatingFiles:
        return RotatingFiles(self._folder / str(uid), self._keep)


class Checkpoints:
    """Saves and restores the experts of a runtime: tensors on its compute thread, files on other threads."""

    def __init__(
        self, store: CheckpointStore, runtime: Runtime, metrics: CollectorRegistry | None = None
    ) -> None:
        self.saved = Counter("talkoot_checkpoints_saved", "Checkpoints written.", registry=metrics)
        self.failed = Counter(
            "talkoot_checkpoint_failures", "Checkpoints that could not be written.", registry=metrics
        )
        self.restored = Counter(
            "talkoot_experts_restored", "Experts that went on from a checkpoint.", registry=metrics
        )
        self._store = store
        self._runtime = runtime
        self._on_disk: dict[UID, int] = {}
        """The update count that each expert was saved or restored with."""

    async def open(self) -> None:
        """Tidies the folder."""
        await asyncio.to_thread(self._store.sweep)

    async def newest(self) -> dict[UID, int]:
        """The update count of each expert's newest checkpoint, not yet verified."""
        return await asyncio.to_thread(self._store.newest)

    async def restore(self, expert: Expert) -> bool:
        """Loads the newest valid checkpoint into an expert that does not serve yet. Returns whether there was one."""
        below: int | None = None
        while checkpoint := await asyncio.to_thread(self._store.load_newest, expert.uid, below):
            state, below = checkpoint.state, checkpoint.update_count
            try:
                await self._runtime.run(partial(expert.import_state, state, below))
            except StateError as error:
                self._store.pass_over(expert.uid, below, error)
                continue
            self._on_disk[expert.uid] = below
            self.restored.inc()
            return True
        self._on_disk.pop(expert.uid, None)
        return False

    async def keep(self, uid: UID, checkpoint: Checkpoint) -> None:
        """Saves the state of an expert that is served elsewhere. Raises OSError."""
        await asyncio.to_thread(self._store.save, uid, checkpoint)

    async def save_every(self, seconds: float) -> None:
        """Saves what changed, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.save_changed()

    async def save_changed(self, experts: Collection[Expert] | None = None) -> None:
        """Saves the experts that took updates since they were last saved: of `experts`, or of all in service.

        One by one. What fails is tried again next time.
        """
        failures: list[tuple[UID, StateError | OSError]] = []
        for expert in list(self._runtime.experts.values() if experts is None else experts):
            if not self._is_changed(expert):
                continue
            try:
                checkpoint = await self._runtime.run(expert.checkpoint)
                await asyncio.to_thread(self._store.save, expert.uid, checkpoint)
            except ExpertError:
                return  # the runtime was stopped
            except (StateError, OSError) as error:
                failures.append((expert.uid, error))
            else:
                self.saved.inc()
                self._on_disk[expert.uid] = checkpoint.update_count
        if failures:
            self.failed.inc(len(failures))
            uid, reason = failures[0]
            logger.warning(
                "could not save %s, such as %s: %s; their checkpoints before this stay",
                counted(len(failures), "expert"),
                uid,
                reason.strerror if isinstance(reason, OSError) and reason.strerror else reason,
            )

    async def save_all_within(self, seconds: float, experts: Collection[Expert] | None = None) -> None:
        """Saves what changed, or as much of it as there is time for."""
        if experts is None:
            experts = list(self._runtime.experts.values())
        try:
            async with asyncio.timeout(seconds):
                await self.save_changed(experts)
        except TimeoutError:
            left = sum(map(self._is_changed, experts))
            logger.warning("no time to save %s; their checkpoints before this stay", counted(left, "expert"))

    def note_replaced(self, uid: UID) -> None:
        """The expert has another state now, perhaps with the same update count, and must be saved."""
        self._on_disk.pop(uid, None)

    def _is_changed(self, expert: Expert) -> bool:
        return expert.update_count != self._on_disk.get(expert.uid, 0)
