"""The model that is served: from a swarm or from a folder."""

import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from dht.announcements import NodeInfo
from peer.errors import ModelError
from talkoot.model.opened import open_model
from talkoot.serve.chat import ChatFormat
from talkoot.signals import StopSignals
from talkoot.terminal import Terminal
from talkoot.train.ask import QuestionAnswerer
from talkoot.train.trained import joined_run, text_model
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.dispatch.batches import CallReply, ExpertCaller, NodeCall
from trainer_client.encoder_decoder import EncoderDecoder
from trainer_client.model import LanguageModel
from trainer_client.retrieval.lookup import Find
from trainer_client.settings import TrainerSettings

logger: logging.Logger = logging.getLogger(__name__)

_WAIT_S = 10.0
"""How long a stream waits if no expert is live."""


@dataclass(frozen=True)
class ServedModel:
    """A model with its experts, wherever they are."""

    name: str
    source: str
    """Where its experts are: "swarm" or "folder"."""
    model: LanguageModel | EncoderDecoder
    tokenizer: Tokenizer
    experts_total: int
    live_experts: Callable[[], int]
    """Returns how many experts can be used now."""
    chat: ChatFormat = field(default_factory=ChatFormat)
    is_usable: Callable[[], bool] = lambda: True
    """Returns whether the last computation's result is valid. May wait, and may raise UserError."""
    require_admitted: Callable[[], None] = lambda: None
    """Raises InviteError once the swarm no longer admits this server. May wait."""
    nodes: Callable[[], frozenset[str]] = frozenset
    """Returns the nodes whose experts have answered since its last call."""
    find: Find | None = None
    """Finds the passages that the model reads while it writes; None: it reads none."""
    questions: QuestionAnswerer | None = None
    """Answers questions; None: the model continues texts."""

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        return self.tokenizer.token_bytes

    @cached_property
    def longest_token(self) -> int:
        """The size of the longest token, in bytes."""
        return max(map(len, self.token_bytes))


class AnsweringNodes:
    """Records which nodes answer, between the dispatcher and the network."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: set[str] = set()

    def take(self) -> frozenset[str]:
        """The nodes that have answered since the last call. For any thread."""
        with self._lock:
            taken = frozenset(self._nodes)
            self._nodes.clear()
        return taken

    def through(self, caller: ExpertCaller) -> ExpertCaller:
        return _NotingCaller(caller, self._note)

    def _note(self, node: NodeInfo) -> None:
        with self._lock:
            self._nodes.add(node.peer_id.with_name(node.name))


@dataclass(frozen=True)
class _NotingCaller:
    caller: ExpertCaller
    note: Callable[[NodeInfo], None]

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        async with contextlib.aclosing(self.caller.call(call)) as replies:
            async for reply in replies:
                self.note(call.node)
                yield reply


@contextmanager
def model_of_swarm(
    terminal: Terminal, signals: StopSignals, join: str | None, settings: TrainerSettings
) -> Iterator[ServedModel]:
    """The dense part of a run's checkpoint, and the swarm's experts. Raises UserError."""
    nodes = AnsweringNodes()
    model: LanguageModel | EncoderDecoder
    with joined_run(terminal, signals, join, settings, through=nodes.through) as run:
        manifest, is_usable = run.client.manifest, partial(run.client.has_experts, _WAIT_S)
        questions, find = None, None
        if run.settings.answers_questions:
            questions = QuestionAnswerer.open(terminal, run, is_usable)
            model = questions.model.generator
        else:
            trained = text_model(terminal, run)
            model, find = trained.language_model(), trained.find
        yield ServedModel(
            manifest.name,
            "swarm",
            model,
            run.tokenizer,
            manifest.experts_total,
            run.client.dispatcher.live_experts,
            is_usable=is_usable,
            require_admitted=run.client.require_admitted,
            nodes=nodes.take,
            find=find,
            questions=questions,
        )


def model_of_folder(path: Path) -> ServedModel:
    """A folder from `talkoot export`, with its experts in this process. Raises UserError."""
    chat = ChatFormat.read(path)
    opened = open_model(path)
    if opened.memory is not None:
        name = opened.memory.memory
        if opened.answering is not None:
            raise ModelError(
                f"the model in {path} answers questions from the memory {name} of its swarm: use `talkoot ask "
                f'--model {path} --join INVITE "…"`'
            )
        logger.warning(
            "the model learned to read the memory %s, which is not in the folder. Without it, the "
            "model writes less well",
            name,
        )
    live = len(opened.experts.blocks)
    return ServedModel(
        opened.manifest.name,
        "folder",
        opened.model,
        opened.tokenizer,
        opened.manifest.experts_total,
        lambda: live,
        chat,
    )
