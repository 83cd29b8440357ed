"""Local mode: all experts of a manifest in this process, without a swarm. It is the baseline for training in a swarm.

The experts are the same as on nodes: they have the same initial parameters, take an optimizer step for each backward
call, and use the same clipping and guard. Whatever would be sent over the network is rounded by the manifest's codec.

Shapes: R rows, K experts for each row, W width of the experts.
"""

import itertools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from grpc import StatusCode

from dht.beam_search import Selection
from dht.directory import NOBODY, LiveExperts, View
from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.experts.grouped import MOST_EXPERTS, MOST_ROWS
from expert_server.serving.batching import Result, WorkItem
from expert_server.serving.compute import compute_together
from peer.codec import Floats, codec_of
from peer.encoding import decode, encode
from peer.errors import ExpertError, WireError
from peer.identity import PeerID
from trainer_client.dispatch.batches import ExpertPart, ForwardPass, NodeBatch, RoutedRows
from trainer_client.dispatch.calls import DispatchMetrics
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress, Validation

T = TypeVar("T")

_OWN_SEED = 0
_NO_KEY = b"\x12\x20"
"""The prefix of made-up PeerIDs."""


class LocalSwarm:
    """Takes the place of a `SwarmClient`, with the same model, settings and experts, but without a swarm."""

    own_seed = _OWN_SEED

    def __init__(self, manifest: Manifest, settings: TrainerSettings) -> None:
        """Raises UserError if the settings or the experts' kind do not fit."""
        self.manifest = manifest
        self.settings: TrainerSettings = settings.in_swarm(manifest)
        self.dispatcher: LocalExperts = LocalExperts(manifest)
        self.routing: Routing = Routing.of(self.settings, manifest, _OWN_SEED)

    def mixture(
        self, layer: int, choose_by: Literal["token", "sequence"] | None = None
    ) -> RemoteMixtureOfExperts:
        """The mixture of the experts in one layer of the model, counted from 0. Raises SettingsError."""
        routing = self.routing
        if choose_by is not None:
            routing = replace(routing, choose_by=choose_by, prefix=0)
        return RemoteMixtureOfExperts(layer, self.manifest, self.dispatcher, run_at_once, routing)

    def wait_for_experts(self, limit_s: float, report: Callable[[str], None], share: float = 1.0) -> None:
        """Returns at once, because all experts are in this process."""

    def wait_for_any(self, limit_s: float, consequence: str) -> bool:
        """Returns at once that it did not warn."""
        return False

    def require_admitted(self) -> None:
        """Does nothing, because nobody admits anybody."""

    def note(self, progress: Progress) -> None:
        """Does nothing, because there is nobody to tell."""

    def note_validation(self, validation: Validation) -> None:
        """Does nothing, because there is nobody to tell."""

    def close(self) -> None:
        """Does nothing, because there is nothing to leave."""


def run_at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("the coroutine waits for something")


@dataclass
class LocalForward(ForwardPass):
    """A forward pass, with what the experts need for their backward pass."""

    parts: list[tuple[ExpertPart, Rows]] = field(default_factory=list)
    """The part of each expert. Its rows have no gradients yet."""


class LocalExperts:
    """All experts of a manifest, as the layer sees them. Several threads may use it; one at a time computes."""

    def __init__(self, manifest: Manifest) -> None:
        grid = manifest.experts.grid
        self.metrics: DispatchMetrics = DispatchMetrics()
        self.experts: dict[UID, Expert] = {uid: Expert(uid, manifest) for uid in manifest.uids()}
        self._view = View(manifest, {}, {}, 0.0)
        self._hosts = {uid: PeerID(_NO_KEY + n.to_bytes(32, "big")) for n, uid in enumerate(self.experts)}
        """A made-up node for each expert, for `nodes_per_token`."""
        self._tables = tuple(np.ones(grid[: d + 1], dtype=bool) for d in range(len(grid)))
        self._lock = threading.Lock()
        self._codec = codec_of(manifest.wire.codec)
        self._gradients = itertools.count()
        """Counts encoded gradients, as seeds for their rounding."""

    def live_experts(self) -> int:
        return len(self.experts)

    async def find(
        self, layer: int, scores: Sequence[Floats], k: int, bias: Floats | None = None
    ) -> LiveExperts:
        """Finds all experts, because all of them are in this process."""
        hosts = {uid: peer_id for uid, peer_id in self._hosts.items() if uid.layer == layer}
        return LiveExperts(layer, self._view, NOBODY, self._tables, hosts)

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        """Sends rows like the dispatcher, but does not choose other experts if an expert's updates are not finite."""
        result = LocalForward.of(rows)
        result.coordinates[:] = selection.coordinates
        with self._lock, torch.set_grad_enabled(rows.keep), torch.autocast("cpu", enabled=False):
            batch = NodeBatch.of(rows.layer, selection.coordinates, selection.valid, rows.grid, rows.segments)
            self._compute(batch, result)
        self.metrics.unanswered_rows.inc(int((~result.answered.any(axis=1)).sum()))
        return result

    def _compute(self, batch: NodeBatch, result: LocalForward) -> None:
        """Computes the answers. Here each slot's answer comes from one expert."""
        asked = []
        for part in batch.parts():
            with self._noting_failures():
                x_RW = torch.from_numpy(self._arrived(result.rows.inputs[part.places]))
                lengths, positions = map(torch.from_numpy, batch.segments(part.places))
                caches = result.rows.caches_of(part)
                asked.append((part, Rows(x_RW, lengths, positions, caches=caches)))
        works = [WorkItem(part.uid, "forward", rows, inf, "", "", result.rows.keep) for part, rows in asked]
        for (part, rows), computed in zip(asked, self._computed(works), strict=True):
            with self._noting_failures():
                if isinstance(computed, ExpertError):
                    raise computed
                result.updates[part.places, part.slots] = self._arrived(computed.tensor.numpy())
                result.answered[part.places, part.slots] = True
                if result.rows.keep:
                    result.parts.append((part, replace(rows, graph=computed.graph)))

    async def send_back(self, forward: ForwardPass, gradients: Floats) -> tuple[Floats, Floats]:
        """Sends gradients back like the dispatcher. Each expert takes one step for all its rows. If an expert fails,
        its gradient is zero.
        """
        assert isinstance(forward, LocalForward), "of another swarm"
        total = np.zeros_like(forward.rows.inputs)
        with self._lock, torch.enable_grad(), torch.autocast("cpu", enabled=False):
            parts, works = [], []
            for part, rows in forward.parts:
                with self._noting_failures():
                    own = self._arrived(gradients[part.places, part.slots], self._next_seed())
                    with_gradients = replace(rows, gradients=torch.from_numpy(own))
                    works.append(WorkItem(part.uid, "backward", with_gradients, inf, "", ""))
                    parts.append(part)
            for part, computed in zip(parts, self._computed(works), strict=True):
                with self._noting_failures():
                    if isinstance(computed, ExpertError):
                        raise computed
                    self.metrics.skipped_updates.inc(computed.skipped_update)
                    self.metrics.rollbacks.inc(computed.rolled_back)
                    total[part.places] += self._arrived(computed.tensor.numpy(), self._next_seed())
            for work in works:
                self.experts[work.uid].settle()
        return total, np.zeros_like(forward.shares)

    def _computed(self, works: Sequence[WorkItem]) -> list[Result | ExpertError]:
        """The results in the order of `works`. Narrow experts are computed several at once, as on a node."""
        results: list[Result | ExpertError] = []
        for group in groups_of(works):
            results += compute_together([self.experts[work.uid] for work in group], group)
        return results

    def _arrived(self, tensor: Floats, seed: bytes | None = None) -> Floats:
        """A tensor after encoding and decoding. Raises ExpertError if the codec refuses a number that is not finite."""
        if self._codec == codec_of("fp32"):
            return tensor
        try:
            return decode(encode(tensor, self._codec, seed), tensor.shape[1], self._codec)
        except WireError as error:
            raise ExpertError(StatusCode.INVALID_ARGUMENT, str(error)) from error

    def _next_seed(self) -> bytes:
        return b"%d" % next(self._gradients)

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        try:
            yield
        except ExpertError as error:
            self.metrics.failures.labels(error.status.name.lower()).inc()


def groups_of(works: Sequence[WorkItem]) -> list[list[WorkItem]]:
    """Groups of work to compute at once: all work that shares a forward pass, or as much other work as is
    worthwhile.
    """
    groups: list[list[WorkItem]] = []
    rows = 0
    for work in works:
        rows += len(work.rows)
        last = groups[-1] if groups else []
        fits = work.shared is not None or (rows <= MOST_ROWS and len(last) < MOST_EXPERTS)
        if last and work.shared is last[0].shared and fits:
            last.append(work)
        else:
            groups.append([work])
            rows = len(work.rows)
    return groups
