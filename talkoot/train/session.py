"""`talkoot train`: joins a swarm, trains, and shows the progress."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from dht.admission import Role
from dht.invites import Invite, invite_of
from dht.manifest import Manifest
from dht.swarm import Swarm, with_known_peers
from expert_server.blocks import read_manifest
from peer.errors import CheckpointError, InviteError, SettingsError, UnreachableError
from peer.files import require_folder
from peer.formatting import counted
from peer.metrics import total
from talkoot.ephemeral import run_in_swarm
from talkoot.signals import Stopped, StopSignals
from talkoot.terminal import Terminal, check_writable, option_text, write_json
from talkoot.train.display import (
    Write,
    check_plot,
    describe_validation,
    logs_written,
    plot_losses,
    progress_shown,
    summary_lines,
)
from talkoot.train.local import LocalSwarm
from talkoot.train.recompute import BlockLoader
from trainer_client.averaging.averager import Averaging
from trainer_client.averaging.dense_part import SharedParameters
from trainer_client.client import SwarmClient
from trainer_client.data.corpus import Dataset
from trainer_client.data.pairs import PairDataset
from trainer_client.data.questions import QuestionBatches
from trainer_client.encoder_decoder import EncoderDecoder
from trainer_client.memory.memories import Memory
from trainer_client.model import LanguageModel, require_memory
from trainer_client.retrieval.answering import PassageLookup, Reader, check_encoder, make_rag_model
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.cache import NeighbourCache
from trainer_client.retrieval.lookup import Lookup, NeighbourLoader, NeighbourLookup, RetrievalCounts
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import (
    Checkpoint,
    CheckpointSaver,
    RunStart,
    checkpoint_folder,
    load_checkpoint,
    prepare_run,
)
from trainer_client.training.in_flight import MAX_IN_FLIGHT
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress, Summary, Validation

logger: logging.Logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Read = TypeVar("Read")

Client: TypeAlias = SwarmClient | LocalSwarm

_COPIES = 4
"""Copies of the parameters in memory: themselves, their gradients and Adam's two moments."""
_MOST_BEHIND = 1024
"""By how many batches a step in flight may lag behind without looking up again what its batches read."""


def run_train(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    local: Path | None,
    settings: TrainerSettings,
    *,
    resume: bool,
    json_file: Path | None,
    joined: str,
) -> None:
    """`joined`: the options to join with, for the next commands. Raises UserError if it can't train, and Stopped after
    a signal. A stopped run prints its summary too.
    """
    if (join is None) == (local is None):
        raise SettingsError(
            "pass either --join INVITE or --local SWARM.TOML. INVITE is the line that you were given, or @FILE with "
            "the file that contains it"
        )
    if local is not None and (resume or settings.checkpoint is not None):
        raise SettingsError(
            "--local saves nothing, because all experts are in this process: leave --resume and --checkpoint out"
        )
    if json_file is not None:
        check_writable(json_file, "--json")
    if settings.plot is not None:
        check_plot(settings.plot)
    where = read_manifest(local) if local is not None else Invite.read(join or "")
    with logs_written(settings.log, settings.tensorboard) as writers:
        values, answers = _train(terminal, signals, where, settings, resume, writers)
    if json_file is not None:
        write_json(json_file, values)
    if terminal.json:
        terminal.event("summary", values)
    else:
        then = next_commands(values, joined, settings, json_file, answers=answers)
        for text in (*summary_lines(values), *then):
            terminal.line(text)
    steps, saved = values["steps"], values["saved_step"]
    if local is None and saved < steps:
        what = f"only {saved} of the {steps} steps are saved" if saved else "nothing of this run is saved"
        raise CheckpointError(
            f"{what}: if the disk is full, make room, or pass another --checkpoint or --state"
        )
    if signals.received is not None:
        raise signals.received


def _train(
    terminal: Terminal,
    signals: StopSignals,
    where: Invite | Manifest,
    settings: TrainerSettings,
    resume: bool,
    writers: Sequence[Write],
) -> tuple[dict[str, Any], bool]:
    """Returns the summary, and whether the model learns to answer questions. `where`: the invite of a swarm, or a
    manifest for training in this process alone.
    """
    state = settings.state_folder
    client: Client
    with (
        _role_first(terminal, where, (Role.TRAINER,) if resume else ()),
        terminal.stages("making ready") as stage,
    ):
        swarm = where.name if isinstance(where, Manifest) else where.keys.swarm_id
        start = prepare_run(settings, resume, swarm, state, stage)
        if isinstance(where, Manifest):
            client = LocalSwarm(where, start.settings)
        else:
            client = SwarmClient(where, start.settings, state, stage=stage, make_loader=BlockLoader.of)
    try:
        # saved with the run, like what the user sets
        chunk = client.settings.chunk_in(client.manifest.model.context)
        settings = client.settings.model_copy(update={"memory_chunk": chunk})
        run = _Run(terminal, signals, client, replace(start, settings=settings))
        values = asdict(run.train(writers)) | _dispatched(client) | {"averagings": run.averagings}
        values |= run.read()
        step = 0 if run.saver is None else run.saver.saved_step
        folder = str(run.saver.folder) if run.saver is not None and step else None
        values |= {"checkpoint": folder, "saved_step": step, "stopped": signals.received is not None}
        return values, settings.answers_questions
    finally:
        signals.ignore()
        client.close()


def next_commands(
    values: Mapping[str, Any],
    joined: str,
    settings: TrainerSettings,
    json_file: Path | None = None,
    *,
    answers: bool = False,
) -> list[str]:
    """What to do with the trained model. `joined`: the options to join with. `json_file`: where the summary was
    written. `answers`: the model learns to answer questions.
    """
    if values["checkpoint"] is None:
        return []
    options = joined
    for name, path in (("--state", settings.state), ("--checkpoint", settings.checkpoint)):
        options += option_text(name, path)
    more = "" if values["stopped"] else f" --steps {2 * values['steps']}"
    written = ("--log", settings.log), ("--tensorboard", settings.tensorboard), ("--plot", settings.plot)
    for name, path in (*written, ("--json", json_file)):  # checkpoints leave these out
        more += option_text(name, path)
    use = f"ask {options} 'YOUR QUESTION'" if answers else f"generate {options} --prompt 'Once upon a time'"
    return [
        f"next: talkoot {use}",
        f"  or: talkoot train {options} --resume{more}",
    ]


def reader_invite(join: str | None, settings: TrainerSettings) -> Invite:
    """The invite for a command that joins with a temporary identity, with addresses of peers that the trainer has met.
    Raises UserError.
    """
    state = settings.state_folder
    require_folder(state)
    return with_known_peers(invite_of(join), state)


def load_run(
    terminal: Terminal, invite: Invite, settings: TrainerSettings
) -> tuple[Checkpoint, TrainerSettings]:
    """The checkpoint that the settings name, or that of the newest run in this swarm, and the settings with which it
    continues. Raises CheckpointError, or InviteError if there is no run because the invite allows none.
    """
    swarm_id, can_train = invite.keys.swarm_id, invite.role is not Role.READER
    with _role_first(terminal, invite, (Role.TRAINER, Role.READER)):
        folder = checkpoint_folder(
            settings.checkpoint, settings.state_folder, swarm_id, newest=True, can_train=can_train
        )
    checkpoint = load_checkpoint(folder, swarm_id)
    return checkpoint, settings.resumed(checkpoint.header.settings)


@contextmanager
def _role_first(terminal: Terminal, where: Invite | Manifest, roles: Sequence[Role]) -> Iterator[None]:
    """If there is no saved run, checks that the invite has not expired and, in the swarm, that it allows one of these
    roles: otherwise, the advice to train first would be no help. Raises InviteError if not.
    """
    try:
        yield
    except CheckpointError:
        if isinstance(where, Invite):
            where.check_expiry()
        # only the manifest tells whether an invite without a token is enough
        if roles and isinstance(where, Invite) and where.role not in roles:
            with suppress(UnreachableError):
                run_in_swarm(
                    terminal, str(where), _nothing, roles, "no saved run: asking what the invite allows"
                )
        raise


async def _nothing(swarm: Swarm) -> None:
    pass


class _Run:
    """One run, in a swarm or in this process alone."""

    def __init__(self, terminal: Terminal, signals: StopSignals, client: Client, start: RunStart) -> None:
        """Waits for experts. Raises UserError."""
        self._terminal = terminal
        self._signals = signals
        self._client = client
        self._settings = settings = start.settings
        self._stop = threading.Event()
        manifest, token_bytes = client.manifest, start.tokenizer.token_bytes
        if start.checkpoint is not None:
            start.checkpoint.check_manifest(manifest)
        seed = client.own_seed if settings.seed is None else settings.seed
        spec = RetrievalSpec.of(settings, manifest.model)
        dataset = None if settings.answers_questions else _dataset(start, manifest, seed)
        if dataset is None:
            if settings.memory is None:
                raise SettingsError(
                    f"memory: with --objective {settings.objective} a model answers from a memory: pass --memory NAME"
                )
            with terminal.stages("reading the questions"):
                Reader(start.tokenizer, manifest.model, settings.memory_length).check(start.questions)
        with terminal.stages("looking for experts") as stage:
            client.wait_for_experts(settings.wait_for_experts_s, once(stage), share=settings.min_experts)
        require_memory(manifest, client.mixture, len(token_bytes), _COPIES, spec)
        self._counts: RetrievalCounts | None = None
        encoder: str | None = None
        with ExitStack() as self._exits:
            # the folder of a new run does not exist yet, and is inside the state folder, which the client has locked
            if start.writer.folder.exists():
                self._exits.enter_context(start.writer.locked())
            if dataset is None:
                self._training, encoder = self._learn_questions(start, seed)
                meanings = [f"answers questions that it finds passages for by the encoder {encoder}"]
            elif isinstance(dataset, PairDataset):
                make_model = partial(EncoderDecoder, manifest, client.mixture, len(token_bytes))
                self._training = Training(make_model(), dataset, settings, make_model)
                meanings = [f"objective {settings.objective}"]
            else:
                self._training = self._learn_text(start, dataset, spec)
                meanings = [] if spec is None else [spec.meaning]
            start.restore(self._training)
            self._averaging = _begin_averaging(client, self._training.part, start, meanings)
            self._exits = self._exits.pop_all()
        self.saver = (
            None
            if isinstance(client, LocalSwarm)
            else CheckpointSaver(start, self._training, manifest, seed, encoder)
        )
        """None in local mode: a dense part is useless without its experts."""

    def _learn_text(self, start: RunStart, dataset: Dataset, spec: RetrievalSpec | None) -> Training:
        client, settings, vocabulary = self._client, self._settings, len(start.tokenizer.token_bytes)
        make_model = partial(LanguageModel, client.manifest, client.mixture, vocabulary, spec)
        if spec is None:
            return Training(make_model(), dataset, settings, make_model)
        logger.info("passages are looked up for each %d tokens (--memory-chunk)", spec.chunk)
        cache = NeighbourCache(settings.state_folder / "neighbours")
        self._exits.callback(cache.close)
        lookup = NeighbourLookup(
            self._open_memory(), start.tokenizer, spec, most_overlap=settings.memory_overlap, cache=cache
        )
        return Training(make_model(), dataset, settings, make_model, self._looked_up(lookup, dataset.batch))

    def _learn_questions(self, start: RunStart, seed: int) -> tuple[Training, str]:
        """Also returns the SHA-256 of the memory's encoder."""
        client, settings, tokenizer = self._client, self._settings, start.tokenizer
        memory = self._open_memory()
        encoder = memory.encoder.sha256.hex()
        if start.checkpoint is not None:
            check_encoder(memory, start.checkpoint.header.encoder)
        make_model = partial(
            make_rag_model, client.manifest, client.mixture, tokenizer, memory.dimensions, settings
        )
        model = make_model()
        batches = QuestionBatches(
            start.questions, seed, settings.validation_share, model.reader.target, tokenizer.token_bytes
        )
        lookup = PassageLookup(memory, model.questions, settings.passages_read)
        loader = self._looked_up(lookup, batches.batch)
        return Training(model, batches, settings, make_model, loader), encoder

    def _looked_up(
        self, lookup: Lookup[Batch, Read], batch: Callable[[int, int], Batch]
    ) -> NeighbourLoader[Batch, Read]:
        """Loads the passages that the model reads with its training batches."""
        self._counts = lookup.counts
        # a step's gradient is the mean over several batches of this size
        size = self._settings.batch_size
        behind = min(MAX_IN_FLIGHT * self._settings.accumulate, _MOST_BEHIND)
        loader = NeighbourLoader(lookup, lambda number: batch(number, size), behind=behind)
        self._exits.callback(loader.close)
        return loader

    @property
    def averagings(self) -> int:
        """Averagings since the start of this run."""
        return 0 if self._averaging is None else int(total(self._averaging.metrics.ends, end="averaged"))

    def train(self, writers: Sequence[Write]) -> Summary:
        """Trains, and saves the last complete step however it ends. `writers` are called with the figures of
        each step.
        """
        settings, needed = self._settings, "--resume"
        saved = frozenset(self._training.history.validated)
        try:
            with (
                progress_shown(self._terminal, settings.steps, self._training.step) as show,
                self._signals.gently(self._stop),
            ):

                def observe(progress: Progress) -> None:
                    self._client.note(progress)
                    values = asdict(progress) | _swarm_now(self._client) | self._averaged()
                    for write in (show, *writers):
                        write(values)
                    if self.saver is not None:
                        self.saver.save_if_due()
                    self._pause_without_experts()

                def validated(validation: Validation) -> None:
                    self._client.note_validation(validation)
                    whence = "from the checkpoint: " if validation.step in saved else ""
                    logger.info("%s%s", whence, describe_validation(validation))

                check = self._client.require_admitted
                return self._training.run(
                    observe, self._stop, validated=validated, check=check, interrupts=(Stopped,)
                )
        except InviteError:
            needed = "--resume with a new invite"
            raise
        finally:
            self._signals.ignore()
            if self.saver is not None:
                self.saver.save()
            self._exits.close()
            if self.saver is not None and 0 < (step := self.saver.saved_step) < settings.steps:
                logger.info("step %d of %d is saved: %s continues from there", step, settings.steps, needed)
            if settings.plot is not None:
                plot_losses(self._training.history, settings.plot)

    def read(self) -> Mapping[str, float]:
        """Counts of the model's look-ups in its memory."""
        return {} if self._counts is None else self._counts.values()

    def _open_memory(self) -> Memory:
        """Raises UserError."""
        if isinstance(self._client, LocalSwarm):
            raise SettingsError(
                "memory: with --local there are no nodes that could host a memory: pass --join"
            )
        with self._terminal.stages("opening the memory"):
            memory = self._client.memory(self._settings.memory)
        logger.info("the model reads the memory %s, of revision %d", memory.id, memory.revision)
        return memory

    def _averaged(self) -> dict[str, Any]:
        """The number of averagings, and those since the previous step."""
        merges = self._training.part.take_merges()
        return {"averagings": self.averagings, "averaged": [asdict(merge) for merge in merges]}

    def _pause_without_experts(self) -> None:
        """Waits while no expert is live, because otherwise only the dense part would learn. Raises UnavailableError if
        none returns in time.
        """
        client, limit_s = self._client, self._settings.wait_for_experts_s
        if client.dispatcher.live_experts() or self._stop.is_set():
            return
        if client.wait_for_any(limit_s, "training pauses"):
            logger.info("training continues with %d live experts", client.dispatcher.live_experts())


def _dataset(start: RunStart, manifest: Manifest, seed: int) -> Dataset | PairDataset:
    settings, tokens, token_bytes = start.settings, start.corpus.tokens, start.tokenizer.token_bytes
    context, share = manifest.model.context, settings.validation_share
    if manifest.model.encoder_layers:
        return PairDataset(tokens, context, settings.objective, token_bytes, seed, share)
    if settings.objective != "causal":
        raise SettingsError(
            f"objective: {settings.objective} is for models with an encoder, but this swarm's model has none: leave it "
            "out"
        )
    align = 1 if settings.memory is None else settings.chunk_in(context)
    return Dataset(tokens, context, seed, share, token_bytes, align)


def _begin_averaging(
    client: Client, part: SharedParameters, start: RunStart, meanings: Sequence[str]
) -> Averaging | None:
    """Begins to average with other trainers. If the settings allow it, a new run starts from another trainer's dense
    part, and so does a resumed run that is far behind. Raises UserError.
    """
    settings = start.settings
    if isinstance(client, LocalSwarm) or not settings.average_every:
        return None
    averaging = client.average(part, start.tokenizer.to_json(), settings.router, *meanings)
    if settings.start_from == "swarm":
        age = client.take_whole(averaging)
        if age is not None:
            logger.info(
                "starting from another trainer's dense part, which has taken %s",
                counted(age, "step"),
            )
    return averaging


def once(stage: Callable[[str], None]) -> Callable[[str], None]:
    """Skips repeated texts."""
    said = [""]

    def say(text: str) -> None:
        if text != said[0]:
            said[0] = text
            stage(text)

    return say


def _swarm_now(client: Client) -> dict[str, Any]:
    return {
        "experts_live": client.dispatcher.live_experts(),
        "experts_total": client.manifest.experts_total,
        "failures": client.dispatcher.metrics.failures_by_cause(),
    }


def _dispatched(client: Client) -> dict[str, Any]:
    return _swarm_now(client) | client.dispatcher.metrics.values()
