"""A small model with all its experts in this process, and servers for it on real sockets."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from shelf import TOKENIZER, Shelf
from training_swarm import MANIFEST

from dht.manifest import Manifest
from peer.loop import LoopThread
from talkoot.serve.model import ServedModel
from talkoot.serve.server import server
from talkoot.serve.settings import ServeSettings
from talkoot.train.ask import QuestionAnswerer
from talkoot.train.local import LocalSwarm
from talkoot.web import address_of, listen
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.model import LanguageModel
from trainer_client.retrieval.answering import RagModel
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.settings import TrainerSettings

CONTEXT = 64
LIMIT_S = 90.0


def small_model(
    context: int = CONTEXT, prefix: int = 0, retrieval: RetrievalSpec | None = None
) -> ServedModel:
    values = MANIFEST.model_dump()
    values["model"]["context"] = context
    values["routing"]["prefix"] = prefix
    manifest = Manifest.model_validate(values)
    swarm = LocalSwarm(manifest, TrainerSettings(seed=0))
    model = LanguageModel(manifest, swarm.mixture, retrieval=retrieval)
    with torch.no_grad():
        model.head.weight *= 4  # so that some tokens are likelier than others
    return ServedModel(
        "village", "folder", model, ByteTokenizer(), manifest.experts_total, swarm.dispatcher.live_experts
    )


def answering(model: RagModel, shelf: Shelf) -> ServedModel:
    """A model that answers questions from the shelf."""
    questions = QuestionAnswerer(model, shelf, "sequence", lambda: True)
    return ServedModel("sauna", "swarm", model.generator, TOKENIZER, 8, lambda: 8, questions=questions)


@contextmanager
def served(loop: LoopThread, model: ServedModel, **settings: Any) -> Iterator[str]:
    """The server's address, with a slash at the end."""
    with listen("127.0.0.1", 0) as listener:
        running = server(model, ServeSettings.load(**settings), listener)
        loop.run(running.__aenter__(), LIMIT_S)
        try:
            yield address_of(listener)
        finally:
            loop.run(running.__aexit__(None, None, None), LIMIT_S)


def without_experts(model: ServedModel) -> ServedModel:
    return replace(model, live_experts=lambda: 0)
