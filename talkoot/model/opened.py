"""A model folder in use in this process: its dense part and its experts, for inference, without `transformers`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dht.beam_search import Selection
from dht.directory import NOBODY, LiveExperts, View, prefix_tables
from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import build_block
from peer.codec import Floats
from talkoot.model.folder import ModelFolder
from talkoot.model.reading import QUESTIONS, FolderMemory
from talkoot.train.local import run_at_once
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.dispatch.batches import ForwardPass, NodeBatch, RoutedRows
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.retrieval.answering import RagModel


class OpenedExperts:
    """The experts of a folder, as a mixture sees them. For inference; any thread may use them."""

    def __init__(self, manifest: Manifest, blocks: Mapping[UID, nn.Module]) -> None:
        """`blocks`: the block of each expert in the folder."""
        self.blocks = blocks
        self._view = View(manifest, {}, {}, 0.0)
        grid = manifest.experts.grid
        self._tables = []
        for layer in range(manifest.model.layers):
            alive = np.zeros(grid, dtype=bool)
            for uid in blocks:
                if uid.layer == layer:
                    alive[uid.coordinate] = True
            self._tables.append(prefix_tables(alive))

    async def find(
        self, layer: int, scores: Sequence[Floats], k: int, bias: Floats | None = None
    ) -> LiveExperts:
        """Finds all experts, because all of them are in this process."""
        return LiveExperts(layer, self._view, NOBODY, self._tables[layer])

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        """Each slot's answer is that of its expert alone."""
        result = ForwardPass.of(rows)
        result.coordinates[:] = selection.coordinates
        batch = NodeBatch.of(rows.layer, selection.coordinates, selection.valid, rows.grid, rows.segments)
        with torch.no_grad():
            for part in batch.parts():
                x_RW = torch.from_numpy(rows.inputs[part.places])
                lengths_S, positions_R = map(torch.from_numpy, batch.segments(part.places))
                caches = rows.caches_of(part)
                others = (caches,) if caches else ()
                y_RW: torch.Tensor = self.blocks[part.uid](x_RW, lengths_S, positions_R, *others)
                result.updates[part.places, part.slots] = (y_RW - x_RW).numpy()
                result.answered[part.places, part.slots] = True
        return result

    async def send_back(self, forward: ForwardPass, gradients: Floats) -> tuple[Floats, Floats]:
        raise AssertionError("a model that was opened from a folder can't be trained")


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model that continues text."""

    model: LanguageModel
    tokenizer: Tokenizer
    manifest: Manifest
    experts: OpenedExperts
    memory: FolderMemory | None
    """How it reads a memory; None: it reads none."""
    answering: RagModel | None
    """Answers questions, with `model` as its generator; None: the model has not learned to."""


def open_model(path: str | Path) -> OpenedModel:
    """Reads the whole folder into memory. Raises UserError if it is incomplete, or memory does not suffice."""
    folder = ModelFolder.open(Path(path))
    manifest, tokenizer = folder.manifest, folder.tokenizer
    folder.require_memory(folder.nbytes)
    experts = OpenedExperts(manifest, {uid: _block(folder, uid) for uid in sorted(folder.live)})
    routing = folder.routing.routing(manifest)

    def mixture(layer: int) -> RemoteMixtureOfExperts:
        return RemoteMixtureOfExperts(layer, manifest, experts, run_at_once, routing)

    memory, tensors = folder.memory, folder.dense()
    spec = None if memory is None else memory.retrieval(manifest)
    model = LanguageModel(manifest, mixture, len(tokenizer.token_bytes), spec)
    answering = None if memory is None else memory.answering(model, manifest, tokenizer)
    if answering is not None:
        own = {
            name.removeprefix(QUESTIONS): tensors.pop(name)
            for name in [*tensors]
            if name.startswith(QUESTIONS)
        }
        answering.questions.load_state_dict(own)
        answering.eval().requires_grad_(False)
    model.load_state_dict(tensors)
    folder.close()
    return OpenedModel(model.eval().requires_grad_(False), tokenizer, manifest, experts, memory, answering)


def _block(folder: ModelFolder, uid: UID) -> nn.Module:
    block = build_block(folder.manifest, uid)
    block.load_state_dict(folder.expert(uid), assign=True)
    return block.eval().requires_grad_(False)
