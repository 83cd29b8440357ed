"""`talkoot memory train-encoder`: an encoder for memories, learned from questions and the passages that answer them."""

import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dht.memory import Passage
from peer.errors import DataError, SettingsError
from peer.files import write_atomically
from peer.formatting import bytes_in_words, counted
from peer.settings import require_extra
from talkoot.memory.build import text_of
from talkoot.memory.dual_training import (
    K,
    NumberedTexts,
    TrainingPairs,
    Validation,
    train_dual_encoder,
    tune,
)
from talkoot.memory.pairs import Pair, hard_negatives, read_pairs, split_by_title
from talkoot.memory.passages import read_passages
from talkoot.memory.training import WordCounter, encoder_of, train_word_vectors
from talkoot.partial import naming_failures
from talkoot.progress import Progress, Rate, Show
from talkoot.terminal import Terminal, check_writable
from trainer_client.data.sources import find_files
from trainer_client.memory.encoder import DualEncoder, StaticEncoder

logger: logging.Logger = logging.getLogger(__name__)

_FEWEST_PAIRS = 100
_FEW_PAIRS = 2000
_MINED = 2**15
"""The most passages in which hard negatives are searched for."""
_MOST_VALIDATED, _LEAST_VALIDATED = 1000, 20
"""The most and the fewest questions for validating an encoder."""
_BESIDE = 2**14
"""The passages among which the answers must be found in validation."""


@dataclass(frozen=True)
class TrainEncoderPlan:
    """What an encoder learns from, and where it is written."""

    pairs: Path
    text: tuple[str, ...]
    out: Path
    field: str = "text"
    title_field: str = "title"
    seed: int = 0


@dataclass(frozen=True)
class TrainEncoderReport:
    """The result of training an encoder."""

    file: str
    pairs: int
    """Pairs that were learned from."""
    negatives: int
    """Negatives that BM25 found for the pairs."""
    passages: int
    words: int
    validation: Validation | None
    """None if there were too few pairs."""
    bytes: int
    seconds: float


def run_train_encoder(terminal: Terminal, plan: TrainEncoderPlan) -> None:
    """Raises UserError."""
    with terminal.stages("reading the pairs") as stage:
        report = train_encoder(plan, Progress(stage, terminal.live).show)
    if terminal.json:
        terminal.event("encoder", asdict(report))
        return
    terminal.line(
        f"{report.file} has an encoder of {counted(report.words, 'word', ',')}, learned from "
        f"{counted(report.pairs, 'pair', ',')} and {counted(report.passages, 'passage', ',')}: "
        f"{bytes_in_words(report.bytes)}, made in {report.seconds:.0f} s"
    )
    if (found := report.validation) is not None:
        terminal.line(
            f"Of {counted(found.questions, 'question', ',')} about titles that it did not learn from, "
            f"{found.by_vectors:.0%} find an answer among the first {K} of {found.passages:,} passages; "
            f"{found.by_words_too:.0%} with words at a weight of {found.word_weight}"
        )
    if report.pairs < _FEW_PAIRS:
        logger.warning(
            "%d pairs are few: an encoder learns most from thousands. Compare it with a memory that was built without "
            "--encoder",
            report.pairs,
        )
    terminal.line(f"Use it: talkoot memory build FILES --encoder {report.file} -o DIR")


def train_encoder(plan: TrainEncoderPlan, show: Show = lambda what, detail: None) -> TrainEncoderReport:
    """Trains an encoder, and writes it. Raises UserError."""
    began = time.monotonic()
    if os.path.exists(plan.out):  # raises no OSError: `check_writable` says what is wrong
        raise SettingsError(f"{plan.out} exists: pass the path of a new file with --out")
    if not os.path.isdir(plan.out.parent):
        raise SettingsError(f"--out {plan.out}: {plan.out.parent} is not a folder; make it first")
    check_writable(plan.out, "--out")
    require_extra("bm25s", "retrieval", "finding hard negatives")
    pairs = read_pairs(plan.pairs)
    rate = Rate(show, "reading the text", None)
    sample = PassageSample(plan.seed)
    for passage in read_passages(find_files(plan.text), plan.field, plan.title_field):
        sample.add(passage)
        rate.at(sample.count)
    if not sample.count:
        raise DataError(f"{', '.join(plan.text)} is empty: give a file or folder with text in it")
    learned = learn(sample, pairs, plan.seed, show)
    data = learned.encoder.to_bytes()
    with naming_failures(plan.out):
        write_atomically(plan.out, data)
    return TrainEncoderReport(
        str(plan.out),
        learned.pairs,
        learned.negatives,
        sample.count,
        len(learned.word_vectors.words),
        learned.validation,
        len(data),
        time.monotonic() - began,
    )


class PassageSample:
    """The words of all passages of a text, and a random sample of its passages."""

    def __init__(self, seed: int) -> None:
        self.words: WordCounter = WordCounter()
        self.some: list[Passage] = []
        self.count = 0
        self._known: set[int] = set()
        self._rng = random.Random(seed)  # noqa: S311  # keeps no secret

    def add(self, passage: Passage) -> None:
        """Counts equal texts once."""
        if not self.add_words(text_of(passage)):
            return
        self.count += 1
        if len(self.some) < _MINED:
            self.some.append(passage)
        elif (at := self._rng.randrange(self.count)) < _MINED:
            self.some[at] = passage

    def add_words(self, text: str) -> bool:
        """Returns whether the text is new."""
        before = len(self._known)
        self._known.add(hash(text))
        if is_new := len(self._known) > before:
            self.words.add(text)
        return is_new


@dataclass(frozen=True)
class Learned:
    """The results of learning from pairs and passages."""

    word_vectors: StaticEncoder
    """Word vectors learned from the passages alone."""
    encoder: DualEncoder
    pairs: int
    """Pairs that were learned from; the others are for validation."""
    negatives: int
    """Negatives that BM25 found for the pairs."""
    validation: Validation | None
    """None if there were too few pairs."""


def learn(
    sample: PassageSample, pairs: Sequence[Pair], seed: int = 0, show: Show = lambda what, detail: None
) -> Learned:
    """`sample`: it can't be used afterwards. Raises UserError."""
    learned, validated = split_by_title(pairs)
    if len(learned) < _FEWEST_PAIRS:
        raise DataError(f"only {counted(len(learned), 'pair')} to learn from: give at least {_FEWEST_PAIRS}")
    for pair in learned:  # questions may have words that the text does not have
        sample.add_words(pair.question)
        sample.add_words(pair.passage)
    words = sample.words.finish()
    rate = Rate(show, "learning word vectors", None, "steps")
    vectors_VD = train_word_vectors(words, seed=seed, watch=rate.step)
    titles, texts = [passage.title for passage in sample.some], [text_of(passage) for passage in sample.some]
    rate = Rate(show, "finding hard negatives", len(learned), "pairs")
    negatives = hard_negatives(learned, titles, texts, rate.at)
    number = {word: at for at, word in enumerate(words.vocabulary)}
    numbered = TrainingPairs(
        NumberedTexts.of([pair.question for pair in learned], number),
        NumberedTexts.of([pair.passage for pair in learned], number),
        NumberedTexts.of([text or "" for text in negatives], number),
    )
    rate = Rate(show, "training the encoders", None, "steps")
    encoder = train_dual_encoder(words, vectors_VD, numbered, seed, rate.step)
    show("validating", counted(len(validated), "pair"))
    if (validation := _validate(encoder, validated, sample.some, seed)) is not None:
        encoder = DualEncoder(encoder.questions, encoder.passages, validation.word_weight)
    found = sum(text is not None for text in negatives)
    return Learned(encoder_of(words, vectors_VD), encoder, len(learned), found, validation)


def _validate(
    encoder: DualEncoder, pairs: Sequence[Pair], some: Sequence[Passage], seed: int
) -> Validation | None:
    if len(pairs) < _LEAST_VALIDATED:
        return None
    rng = random.Random(seed)  # noqa: S311  # keeps no secret
    asked = rng.sample(pairs, min(_MOST_VALIDATED, len(pairs)))
    texts = dict.fromkeys(pair.passage for pair in asked)
    subjects = {pair.subject for pair in asked}
    for passage in rng.sample(some, min(_BESIDE, len(some))):
        texts[text_of(passage)] = None
    passages = list(texts)
    by_subject = defaultdict[str, list[int]](list)
    for at, whole in enumerate(passages):
        title, _, text = whole.lower().partition("\n")
        for subject in subjects & {title, text}:
            by_subject[subject].append(at)
    answers = [np.array(by_subject[pair.subject]) for pair in asked]
    return tune(encoder, [pair.question for pair in asked], passages, answers)
