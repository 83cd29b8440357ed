"""`talkoot evaluate`, and opening a trained model with its swarm.

The dense part comes from a checkpoint, and the experts are called in the swarm.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from peer.errors import LibraryError, SettingsError, UnreachableError
from peer.formatting import counted
from peer.metrics import total
from talkoot.progress import Progress, Rate
from talkoot.signals import Stopped, StopSignals
from talkoot.terminal import Terminal, escaped, to_json
from talkoot.train.recompute import BlockLoader
from talkoot.train.session import load_run, once, reader_invite
from trainer_client.client import SwarmClient
from trainer_client.data.corpus import encode_corpus
from trainer_client.data.sources import find_texts
from trainer_client.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from trainer_client.dispatch.batches import ExpertCaller
from trainer_client.encoder_decoder import EncoderDecoder, make_model
from trainer_client.inference import (
    Evaluation,
    check_length,
    combined,
    evaluations,
)
from trainer_client.model import LanguageModel, require_memory, require_no_encoder
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.lookup import Find, NeighbourLookup
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import Checkpoint

logger: logging.Logger = logging.getLogger(__name__)

_EVALUATING = "evaluating"


@dataclass(frozen=True, eq=False)
class JoinedRun:
    """A run's checkpoint, and its swarm. Usable until the block that opened it ends."""

    client: SwarmClient
    checkpoint: Checkpoint
    settings: TrainerSettings
    """The checkpoint's settings, overridden by those given now."""
    tokenizer: Tokenizer

    @property
    def retrieval(self) -> RetrievalSpec | None:
        """How its model reads a memory chunk by chunk, if it does."""
        return RetrievalSpec.of(self.settings, self.client.manifest.model)


@dataclass(frozen=True, eq=False)
class TextModel:
    """The model of a run that has learned from text."""

    run: JoinedRun
    model: LanguageModel | EncoderDecoder
    lookup: NeighbourLookup | None
    """Looks up passages that the model reads; None: it reads none, or its memory is not available."""

    def language_model(self) -> LanguageModel:
        """Raises SettingsError if the model is an encoder-decoder."""
        require_no_encoder(self.run.client.manifest)
        assert isinstance(self.model, LanguageModel)
        return self.model

    @property
    def find(self) -> Find | None:
        return None if self.lookup is None else self.lookup.written


@contextmanager
def joined_run(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    settings: TrainerSettings,
    prepare: Callable[[Tokenizer, TrainerSettings, Path], None] = lambda tokenizer, settings, folder: None,
    through: Callable[[ExpertCaller], ExpertCaller] = lambda caller: caller,
) -> Iterator[JoinedRun]:
    """Joins with a temporary identity, so that a trainer can run at the same time. Raises UserError if it fails.

    `prepare` is called first, with the tokenizer, the settings and a folder that lasts as long as the run is open.
    `through` wraps the network, for example to observe calls.
    """
    invite = reader_invite(join, settings)
    checkpoint, settings = load_run(terminal, invite, settings)
    if settings.memory is not None and checkpoint.header.settings.get("memory") is None:
        raise SettingsError("memory: this model has not learned to read one: leave --memory out")
    tokenizer = load_tokenizer(checkpoint.header.tokenizer)
    with tempfile.TemporaryDirectory(prefix="talkoot-model-") as name:
        folder = Path(name)
        prepare(tokenizer, settings, folder)
        with terminal.stages("making ready") as stage:
            client = SwarmClient(
                invite,
                settings,
                folder / "state",
                stage=stage,
                through=through,
                reads_only=True,
                make_loader=BlockLoader.of,
            )
        try:
            checkpoint.check_manifest(client.manifest)
            with terminal.stages("looking for experts") as stage:
                share = 1 / client.manifest.experts_total
                client.wait_for_experts(settings.wait_for_experts_s, once(stage), share=share)
            run = JoinedRun(client, checkpoint, settings, tokenizer)
            vocabulary = len(tokenizer.token_bytes)
            require_memory(client.manifest, client.mixture, vocabulary, 1, run.retrieval)
            yield run
        finally:
            signals.ignore()
            client.close()


def text_model(terminal: Terminal, run: JoinedRun) -> TextModel:
    """Loads the model of a run that has learned from text."""
    model = make_model(run.client.manifest, run.client.mixture, len(run.tokenizer.token_bytes), run.retrieval)
    run.checkpoint.load_into(model)
    return TextModel(run, model, _open_lookup(terminal, run))


def _open_lookup(terminal: Terminal, run: JoinedRun) -> NeighbourLookup | None:
    """None if the model reads nothing, or its memory is not available: it works without it, but worse."""
    spec, settings = run.retrieval, run.settings
    if spec is None:
        return None
    try:
        with terminal.stages("opening the memory"):
            memory = run.client.memory(settings.memory)
    except (LibraryError, UnreachableError) as error:
        logger.warning("the model reads nothing: %s. Another memory can be passed as --memory NAME", error)
        return None
    return NeighbourLookup(memory, run.tokenizer, spec, most_overlap=settings.memory_overlap)


def run_evaluate(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    paths: Sequence[str],
    settings: TrainerSettings,
) -> None:
    """Each path is a text of its own, whose files are joined. Raises UserError if it fails, and Stopped after
    a signal, once it has printed the figures for what was done until then.
    """
    texts = find_texts(paths)
    read: dict[str, Tokens] = {}

    def read_texts(tokenizer: Tokenizer, settings: TrainerSettings, folder: Path) -> None:
        if settings.answers_questions:
            raise SettingsError('this run\'s model answers questions: use `talkoot ask --join INVITE "…"`')
        for number, (name, files) in enumerate(texts.items()):
            # a separate folder, because one folder holds one text
            read[name] = encode_corpus(files, settings.field, tokenizer, folder / f"text-{number}").tokens
            check_length(read[name], 1, name)

    with joined_run(terminal, signals, join, settings, read_texts) as run:
        trained = text_model(terminal, run)
        trained.language_model()
        for name, tokens in read.items():  # again: a swarm may route by a prefix, which no checkpoint tells
            check_length(tokens, trained.model.first_scored, name)
        found: dict[str, Evaluation] = {}
        stopped: Stopped | None = None
        try:
            _evaluate(terminal, trained, read, found)
        except Stopped as error:
            if not found:
                raise
            stopped = error
        unanswered = int(total(run.client.dispatcher.metrics.unanswered_rows))
    values = asdict(combined(list(found.values())))
    rest = {"step": run.checkpoint.header.step, "unanswered_rows": unanswered}
    if terminal.json:
        each = [{"name": name} | asdict(evaluation) for name, evaluation in found.items()]
        terminal.line(to_json(values | rest | ({"texts": each} if len(each) > 1 else {})))
    elif len(found) > 1:
        terminal.out.print(_comparison(found))
        terminal.out.print(_table(rest))
    else:
        terminal.out.print(_table(values | rest))
    if stopped is not None:
        logger.warning(
            "stopped: these are the figures for the first %s of %s",
            f"{values['tokens']:,}",
            counted(_predicted(read, trained.model.first_scored), "token", ","),
        )
        raise stopped


def _predicted(texts: Mapping[str, Tokens], first: int) -> int:
    """How many tokens of the texts are predicted, if the first one of each is number `first`."""
    return sum(len(tokens) - first for tokens in texts.values())


def _evaluate(
    terminal: Terminal, trained: TextModel, texts: Mapping[str, Tokens], found: dict[str, Evaluation]
) -> None:
    """Adds each text's scores to `found`. If it is stopped, they are those of the tokens until then."""
    run, first, done_before = trained.run, trained.model.first_scored, 0
    total_tokens = _predicted(texts, first)
    with terminal.stages(_EVALUATING) as stage:
        progress = Progress(stage, terminal.live, _EVALUATING)
        rate = Rate(progress.show, _EVALUATING, total_tokens, "tokens")

        def observe(done: int) -> bool:
            rate.at(done_before + done)
            return run.client.has_experts()

        for name, tokens in texts.items():
            token_bytes, batch_size = run.tokenizer.token_bytes, run.settings.batch_size
            neighbours = None if trained.lookup is None else trained.lookup.learned
            for scores in evaluations(
                trained.language_model(), tokens, token_bytes, batch_size, observe, neighbours
            ):
                found[name] = scores
            done_before += found[name].tokens


def _table(values: Mapping[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    return table


def _comparison(found: Mapping[str, Evaluation]) -> Table:
    """A row for each text, and one for all of them together."""
    table = Table()
    table.add_column("text", overflow="fold")
    for column in ("tokens", "loss", "bits per byte", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, each in found.items():
        table.add_row(escaped(name), *_figures(each))
    table.add_section()
    table.add_row("all", *_figures(combined(list(found.values()))))
    return table


def _figures(evaluation: Evaluation) -> list[str]:
    figures = (evaluation.loss, evaluation.bits_per_byte, evaluation.perplexity)
    return [str(evaluation.tokens), *(f"{figure:.4f}" for figure in figures)]
