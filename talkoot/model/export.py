"""`talkoot export`: writes the model that a swarm trains into a folder that its user keeps."""

import logging
import shlex
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor

from dht.uid import UID
from peer.errors import SettingsError, UnavailableError
from peer.formatting import bytes_in_words, counted
from talkoot.model.card import CardFacts, ExpertSource, SourcesFile, model_card
from talkoot.model.dense import ExportedDense, dense_of_run, dense_of_trainers
from talkoot.model.experts import SwarmExperts, TakenExpert
from talkoot.model.folder import FolderRouting, FolderWriter
from talkoot.model.usage import WatchedExperts, most_used
from talkoot.partial import PARTIAL, check_new
from talkoot.progress import Progress, Rate
from talkoot.signals import Stopped, StopSignals
from talkoot.terminal import Terminal, to_json
from talkoot.train.session import load_run, once, reader_invite
from trainer_client.client import SwarmClient
from trainer_client.data.corpus import encode_corpus
from trainer_client.data.sources import find_files
from trainer_client.data.tokenizer import Tokenizer, Tokens, read_tokenizer
from trainer_client.inference import check_length, evaluate
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import Checkpoint

logger: logging.Logger = logging.getLogger(__name__)

_NAMED = 5
"""The most missing experts that an error names."""
_LOOK_EVERY_S = 2.0
_FETCHING = "fetching experts"


@dataclass(frozen=True)
class ExportPlan:
    """What to export, and where to."""

    out: Path
    resume: bool = False
    """Whether to take the dense part from this machine's newest run."""
    allow_missing: bool = False
    keep: float | None = None
    """The share of each layer's experts to keep; None: all."""
    keep_by: str | None = None
    """The text that decides which experts are kept."""
    data_note: str = ""
    download_mbit: float | None = None

    def check(self) -> None:
        """Raises UserError."""
        if (self.keep is None) != (self.keep_by is None):
            raise SettingsError(
                "--keep and --keep-by must be given together: the share of experts to keep, and the text that decides "
                "which experts"
            )
        check_new(self.out, "-o")


def run_export(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    settings: TrainerSettings,
    plan: ExportPlan,
    joined: str,
) -> None:
    """`joined`: the options to join with, for the next command. Raises UserError if it fails, and Stopped after a
    signal. The same command then resumes later.
    """
    plan.check()
    began = time.monotonic()
    invite = reader_invite(join, settings)
    tokenizer = _tokenizer(settings)
    given, checkpoint = settings, None
    if plan.resume or settings.checkpoint is not None:
        checkpoint, settings = load_run(terminal, invite, settings)
    with tempfile.TemporaryDirectory(prefix="talkoot-export-") as name:
        folder = Path(name)
        with terminal.stages("making ready") as stage:
            client = SwarmClient(
                invite, settings, folder / "state", stage=stage, reads_only=True, exports=True
            )
        try:
            export = _Export(terminal, client, plan, folder)
            try:
                export.run(lambda experts: _dense(client, given, checkpoint, tokenizer, experts))
            except UnavailableError:
                client.require_admitted(reads=True)
                raise
            except Stopped:
                logger.info("stopped; run the same command again to continue with %s", export.partial)
                raise
            finally:
                export.close()
            export.report(time.monotonic() - began, joined)
        finally:
            signals.ignore()
            client.close()


def _tokenizer(settings: TrainerSettings) -> Tokenizer:
    if settings.tokenizer == "bpe":
        raise SettingsError("tokenizer: pass the tokenizer.json that the swarm's trainers share, or bytes")
    return read_tokenizer(settings.tokenizer)


def _dense(
    client: SwarmClient,
    given: TrainerSettings,
    checkpoint: Checkpoint | None,
    tokenizer: Tokenizer,
    experts: WatchedExperts,
) -> ExportedDense:
    if checkpoint is not None:
        return dense_of_run(client, checkpoint, experts)
    return dense_of_trainers(client, given, tokenizer, experts)


class _Export:
    """One run of the command, after it has joined the swarm."""

    def __init__(self, terminal: Terminal, client: SwarmClient, plan: ExportPlan, folder: Path) -> None:
        """`folder`: for temporary files."""
        self.partial = plan.out.with_name(plan.out.name + PARTIAL)
        self._terminal = terminal
        self._client = client
        self._plan = plan
        self._folder = folder
        self._wait_s = client.settings.wait_for_experts_s
        self._experts = client.run(self._open())
        self._figures: dict[str, float] = {}
        self._sources: Mapping[UID, ExpertSource] = {}

    async def _open(self) -> SwarmExperts:
        patience_s = 0.0 if self._plan.allow_missing else self._wait_s
        return SwarmExperts(self._client.swarm, self._plan.download_mbit, patience_s)

    def close(self) -> None:
        self._client.run(self._experts.close())

    def run(self, dense_by: Callable[[WatchedExperts], ExportedDense]) -> None:
        """Raises UserError."""
        plan, client = self._plan, self._client
        watched = WatchedExperts(client.dispatcher)
        with self._terminal.stages("looking for experts") as stage:
            self._survey(once(stage))
            stage("fetching the dense part")
            dense = dense_by(watched)
            wanted = frozenset(self._experts.hosts)
            if plan.keep is not None and plan.keep_by is not None:
                wanted = self._most_used(dense, watched, plan.keep, plan.keep_by, stage)
        routing = FolderRouting.of(dense.routing)
        with FolderWriter(plan.out, client.manifest, routing, dense.tokenizer, dense.memory) as writer:
            writer.write_dense(dense.tensors)
            file = SourcesFile(writer.partial)
            self._write_layers(writer, file, wanted)
            self._sources = file.experts
            writer.finish(model_card(self._facts(dense)))

    def report(self, seconds: float, joined: str) -> None:
        total, received = self._client.manifest.experts_total, self._experts.received_bytes
        if self._terminal.json:
            values = {"folder": str(self._plan.out), "experts": len(self._sources), "experts_total": total}
            self._terminal.line(to_json(values | {"bytes": received, "seconds": seconds} | self._figures))
            return
        for name, loss in self._figures.items():
            self._terminal.line(f"{name}: {loss:.4f} nats per token")
        self._terminal.line(
            f"{self._plan.out} has the model with {len(self._sources)} of {counted(total, 'expert')}: fetched "
            f"{bytes_in_words(received)} of experts in {seconds:.0f} s"
        )
        path = shlex.quote(str(self._plan.out))
        command = (
            f"ask {joined} --model {path} 'YOUR QUESTION'"
            if self._client.settings.answers_questions
            else f"serve --model {path}"
        )
        self._terminal.line(f"next: talkoot {command}")

    def _survey(self, stage: Callable[[str], None]) -> None:
        """Reads who hosts what. Raises UnavailableError if required experts are missing."""
        deadline = time.monotonic() + self._wait_s
        while (missing := self._client.run(self._experts.survey())) and not self._plan.allow_missing:
            named = ", ".join(map(str, missing[:_NAMED])) + (", …" if len(missing) > _NAMED else "")
            what = f"{counted(len(missing), 'expert')} of {self._client.manifest.experts_total} ({named})"
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"no live node hosts {what}: wait until one does, or pass --allow-missing to mask them"
                )
            stage(f"waiting for {what}, at most {self._wait_s:.0f} s")
            time.sleep(_LOOK_EVERY_S)
        if not self._experts.hosts:
            raise UnavailableError(
                "no live node hosts an expert of this swarm: `talkoot status --join INVITE` shows who is there"
            )
        if missing:
            logger.warning("%s without a live host will be masked", counted(len(missing), "expert"))

    def _most_used(
        self,
        dense: ExportedDense,
        watched: WatchedExperts,
        share: float,
        path: str,
        stage: Callable[[str], None],
    ) -> frozenset[UID]:
        settings, token_bytes = self._client.settings, dense.tokenizer.token_bytes
        files = find_files([path])
        tokens: Tokens = encode_corpus(files, settings.field, dense.tokenizer, self._folder / "text").tokens
        first = dense.model.first_scored
        check_length(tokens, first, path)
        progress = Progress(stage, self._terminal.live)

        def loss(what: str) -> float:
            rate = Rate(progress.show, what, len(tokens) - first, "tokens")

            def observe(done: int) -> bool:
                rate.at(done)
                return self._client.has_experts()

            return evaluate(dense.model, tokens, token_bytes, settings.batch_size, observe).loss

        self._figures["loss before leaving experts out"] = loss(f"looking which experts {path} uses")
        watched.kept = most_used(watched.rows, self._experts.hosts, share, dense.routing.k)
        self._figures["loss after leaving experts out"] = loss("measuring the loss without the others")
        return watched.kept

    def _write_layers(self, writer: FolderWriter, file: SourcesFile, wanted: frozenset[UID]) -> None:
        by_layer = {
            layer: {uid for uid in wanted if uid.layer == layer}
            for layer in range(self._client.manifest.model.layers)
        }
        # experts that have died since still belong to the layer, but those that the text does not use are not wanted
        todo = {
            layer: uids
            for layer, uids in by_layer.items()
            if not writer.has_layer(layer)
            or not uids <= (there := file.of_layer(layer).keys())
            or (self._plan.keep is not None and uids != there)
        }
        if len(todo) < len(by_layer):
            logger.info("continuing: %s already complete", counted(len(by_layer) - len(todo), "layer"))
        with self._shown(sum(map(len, todo.values()))) as (tick, advance):
            for layer, uids in todo.items():
                sources: dict[UID, ExpertSource] = {}
                # otherwise, if this is stopped, the written part would pass for what was there before
                file.replace_layer(layer, {})
                # if it can't be written, nothing more is fetched
                with closing(self._arriving(uids, sources, tick, advance)) as arriving:
                    writer.write_layer(layer, arriving)
                file.replace_layer(layer, sources)
                if not self._terminal.live:
                    fetched = bytes_in_words(self._experts.received_bytes)
                    logger.info(
                        "layer %d is complete: %s, %s so far", layer, counted(len(sources), "expert"), fetched
                    )

    def _arriving(
        self,
        uids: Collection[UID],
        sources: dict[UID, ExpertSource],
        tick: Callable[[], None],
        advance: Callable[[], None],
    ) -> Generator[tuple[UID, Mapping[str, Tensor]]]:
        """Yields experts as they arrive, and adds each one's origin to `sources`. Raises UnavailableError if a required
        expert does not arrive.
        """
        with closing(self._experts.each(self._client, uids, tick)) as each:
            for uid, taken in each:
                if taken is not None:
                    yield uid, taken.tensors
                    sources[uid] = self._source(taken)
                else:
                    self._require_optional(uid)
                advance()

    def _require_optional(self, missing: UID) -> None:
        """Raises UserError if the export can't go on without this expert."""
        self._client.require_admitted(reads=True)
        if not self._plan.allow_missing:
            raise UnavailableError(
                f"no host of expert {missing} sent usable parameters: run the same command again (complete layers are "
                "kept), or pass --allow-missing"
            )

    def _source(self, taken: TakenExpert) -> ExpertSource:
        replicas = {
            replica.peer_id.to_base58(): replica.update_count for replica in self._experts.hosts[taken.uid]
        }
        return ExpertSource(updates=taken.update_count, node=taken.peer_id.to_base58(), replicas=replicas)

    def _facts(self, dense: ExportedDense) -> CardFacts:
        swarm = self._client.swarm
        givers = {peer for source in self._sources.values() for peer in source.replicas}
        names = [node.name for peer_id, node in self._experts.nodes.items() if peer_id.to_base58() in givers]
        return CardFacts(
            swarm.keys.swarm_id, self._client.manifest, dense, self._sources,
            is_pruned=self._plan.keep is not None, figures=self._figures, names=names,
            data_note=self._plan.data_note, exported_at=time.time(),
        )  # fmt: skip

    @contextmanager
    def _shown(self, total: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """Yields two functions: one to call at intervals, and one to call for each expert that has arrived."""
        began, done = time.monotonic(), 0

        def rate() -> str:
            return bytes_in_words(self._experts.received_bytes / max(1e-3, time.monotonic() - began)) + "/s"

        if not self._terminal.live:
            progress = Progress(logger.info, False, _FETCHING)

            def advance() -> None:
                nonlocal done
                done += 1

            yield lambda: progress.show(_FETCHING, f"{done} of {total}, {rate()}"), advance
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("experts, {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with ProgressBar(*columns, console=self._terminal.err, transient=True) as bar:
            task = bar.add_task("", total=total, rate=rate())
            yield lambda: bar.update(task, rate=rate()), lambda: bar.advance(task)
