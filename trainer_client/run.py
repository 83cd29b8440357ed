"""One run of training: what it starts from, and how it is saved."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dht.manifest import Manifest
from peer.errors import CheckpointError, DataError, SettingsError, StateError
from peer.processes import StateFolder
from trainer_client.training.checkpoints import Checkpoint, CheckpointWriter, Header, load_checkpoint, manifest_sha256, new_run_folder, newest_run_folder
from trainer_client.corpus import Corpus, prepare
from trainer_client.settings import TrainerSettings
from trainer_client.data.sources import find_files, read_text
from trainer_client.data.tokenizer import BytePairTokenizer, ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer
from trainer_client.training.loop import Training

logger = logging.getLogger(__name__)

_FIXED = ("tokenizer", "vocabulary")
"""Settings that a resume can't change: the model would be another one."""


@dataclass(frozen=True, eq=False)
class Start:
    """What a run starts from. All of it is known before the swarm is joined."""

    settings: TrainerSettings
    swarm_id: str
    checkpoint: Checkpoint | None
    """None for a new run."""
    writer: CheckpointWriter
    tokenizer: Tokenizer
    corpus: Corpus

    def restore(self, training: Training) -> None:
        """Takes the checkpoint over, if there is one. Raises CheckpointError when it is of another model."""
        if self.checkpoint is None:
            return
        header = self.checkpoint.header
        try:
            training.import_state(self.checkpoint.tensors)
        except StateError as error:
            raise CheckpointError(f"the checkpoint of step {header.step} does not fit: {error}") from error
        training.part.age = header.step if header.age is None else header.age
        logger.info("goes on after step %d", header.step)


def start_run(
    settings: TrainerSettings, resume: bool, swarm_id: str, state: Path, stage: Callable[[str], None]
) -> Start:
    """`state`: the trainer's state folder. `stage` is told what happens. Raises UserError."""
    with closing(StateFolder(state)):
        folder = checkpoint_folder(settings.checkpoint, state, swarm_id, newest=resume)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file: give its folder, where more checkpoints can stand")
        checkpoint = load_checkpoint(folder, swarm_id) if resume else None
        if checkpoint is not None:
            settings = _resumed(settings, checkpoint.header)
        writer = CheckpointWriter(folder, settings.checkpoints_kept)
        if resume or settings.checkpoint is not None:
            writer.open(resume)
        files = find_files(settings.data)
        stage("reading the text")
        if checkpoint is None:
            tokenizer = _make_tokenizer(settings, files, stage)
        else:
            tokenizer = load_tokenizer(checkpoint.header.tokenizer)
        corpus = prepare(files, settings.field, tokenizer, state / "text")
    if checkpoint is not None and checkpoint.header.data_sha256 != corpus.sha256:
        logger.warning("the text is not the one that the checkpoint was trained on")
    return Start(settings, swarm_id, checkpoint, writer, tokenizer, corpus)


def checkpoint_folder(given: Path | None, state: Path, swarm_id: str, *, newest: bool) -> Path:
    """What `--checkpoint` says, else that of the newest run in the state folder, or of a new one.

    Raises CheckpointError when there is no newest run.
    """
    if given is not None:
        return given
    runs = state / "runs" / swarm_id
    return newest_run_folder(runs) if newest else new_run_folder(runs)


class Saver:
    """Saves a run's checkpoints: every so many steps, and at the end."""

    def __init__(self, start: Start, training: Training, manifest: Manifest, seed: int) -> None:
        self.folder = start.writer.folder
        self.saved_step = training.step
        """Of the newest checkpoint of this run; the one it began with before there is any."""
        self._start = start
        self._training = training
        self._manifest_sha256 = manifest_sha256(manifest)
        self._seed = seed

    def save_if_due(self) -> None:
        every = self._start.settings.checkpoint_every
        if every and self._training.step % every == 0:
            self.save()

    def save(self) -> None:
        """Saves the last whole step, if it is not saved yet. What fails is said."""
        step = self._training.step
        tensors = self._training.export_state() if step > self.saved_step else None
        if tensors is None:
            return
        start = self._start
        header = Header(
            swarm_id=start.swarm_id,
            manifest_sha256=self._manifest_sha256,
            step=step,
            age=self._training.part.age,
            saved_at=time.time(),
            tokenizer=start.tokenizer.to_json(),
            data_sha256=start.corpus.sha256,
            settings=start.settings.saved(self._seed),
        )
        if start.writer.save(header, tensors):
            self.saved_step = step


def _resumed(settings: TrainerSettings, header: Header) -> TrainerSettings:
    """Those of the checkpoint where nothing else is given now, and a warning that names what differs."""
    resumed = settings.resumed(header.settings)
    now = resumed.saved(resumed.seed or 0)
    changes = [
        f"{name} {now[name]}, not {value}" for name, value in header.settings.items() if now[name] != value
    ]
    for name in _FIXED:
        if now[name] != header.settings[name]:
            raise SettingsError(
                f"{name}: the checkpoint's model has {header.settings[name]}, and can't change to {now[name]}"
            )
    if header.step >= resumed.steps:
        raise SettingsError(
            f"steps: the checkpoint has done all of the {resumed.steps} steps: pass more, such as --steps "
            f"{2 * header.step}"
        )
    if changes:
        logger.warning("goes on otherwise than it would have done: %s", "; ".join(changes))
    return resumed


def _make_tokenizer(settings: TrainerSettings, files: list[Path], stage: Callable[[str], None]) -> Tokenizer:
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    if settings.tokenizer != "bpe":
        return read_tokenizer(Path(settings.tokenizer))
    stage("learning a tokenizer from the text")
    try:
        characters = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise DataError(f"can't read {error.filename}: {error.strerror}; check who may read it") from error
    tokenizer = BytePairTokenizer.learn(read_text(files, settings.field), characters, settings.vocabulary)
    logger.info("the tokenizer has %d tokens", len(tokenizer.token_bytes))
    return tokenizer
