"""Models with random weights, and folders that contain them."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.format import block_tensors
from peer.layers import seeded
from talkoot.model.folder import INDEX, FolderRouting, FolderWriter
from talkoot.model.reading import QUESTIONS, FolderMemory
from talkoot.train.local import LocalSwarm
from trainer_client.data.tokenizer import ByteTokenizer, Tokenizer
from trainer_client.model import LanguageModel
from trainer_client.routers import Routing
from trainer_client.settings import TrainerSettings


def reads(objective: str, **changes: Any) -> FolderMemory:
    """How a model reads that answers questions, or writes, by its objective."""
    values: dict[str, Any] = {
        "memory_chunk": 4,
        "memory_passages": None,
        "memory_length": 8,
        "memory_layers": (),
    }
    if objective != "causal":
        values |= {"encoder": "ab" * 32, "dimensions": 16}
    return FolderMemory.model_validate({"memory": "sauna-lore", "objective": objective} | values | changes)


class RandomModel:
    """A model with its experts in which no parameter is zero, as some are before training."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer | None = None,
        missing: Collection[str] = (),
        memory: FolderMemory | None = None,
        **settings: Any,
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer or ByteTokenizer()
        self.swarm = LocalSwarm(manifest, TrainerSettings(**settings))
        self.routing = FolderRouting.of(Routing.of(self.swarm.settings, manifest, 0))
        self.missing = {UID.parse(text) for text in missing}
        self.memory = memory
        spec = None if memory is None else memory.retrieval(manifest)
        vocabulary = len(self.tokenizer.token_bytes)
        self.model = LanguageModel(manifest, self.swarm.mixture, vocabulary, spec).eval()
        self.answering = None if memory is None else memory.answering(self.model, manifest, self.tokenizer)
        seeded(1, self._disturb)

    def _disturb(self) -> torch.nn.Module:
        blocks = [expert.block for expert in self.swarm.dispatcher.experts.values()]
        questions = () if self.answering is None else (self.answering.questions,)
        for module in (self.model, *questions, *blocks):
            for name, tensor in module.state_dict().items():
                # If routing depended on rounding errors, a comparison would say nothing.
                size = 2.0 if ".gate." in name else 0.3
                tensor += size * tensor.abs().mean().clamp_min(0.1) * torch.randn_like(tensor)
        return self.model

    def write(self, path: Path, card: str = "A test.\n") -> Path:
        with FolderWriter(path, self.manifest, self.routing, self.tokenizer, self.memory) as writer:
            beside = {} if self.answering is None else self.answering.questions.state_dict(prefix=QUESTIONS)
            writer.write_dense({**self.model.state_dict(), **beside})
            for layer in range(self.manifest.model.layers):
                self.write_layer(writer, layer)
            writer.finish(card)
        return path

    def write_layer(self, writer: FolderWriter, layer: int) -> None:
        experts = self.swarm.dispatcher.experts
        writer.write_layer(
            layer,
            (
                (uid, block_tensors(expert.block))
                for uid, expert in experts.items()
                if uid.layer == layer and uid not in self.missing
            ),
        )


def change_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces one file of a folder, as its owner may: the index has no SHA-256 of it any more."""
    save_file(tensors, path)
    change_json(path.parent / INDEX, sha256={})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
