"""The training loop: AdamW with warm-up and cosine over the dense part of a model."""

import math
import statistics
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peer.errors import UserError
from trainer_client.balancing import LoadSpread
from trainer_client.data import ByteDataset
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings

SKIPPED_IN_A_ROW = 10
_ROLLING_STEPS = 20
_LOWEST_RATE = 0.1  # of the highest, where the cosine ends


@dataclass(frozen=True)
class Progress:
    """Where training is after a step (from 1). A skipped step has a loss that is not finite."""

    step: int
    steps: int
    loss: float  # nats per byte
    validation_loss: float | None  # nats per byte; None unless it was measured after this step
    tokens_per_s: float  # over the last 20 steps
    step_s: float  # since the end of the step before, validation left out
    load_cv: float | None  # of the rows of each live expert; None where there was none: see LoadSpread
    load_max_over_mean: float | None


@dataclass(frozen=True)
class Summary:
    """What a run did. `steps` may be fewer than asked for: it was stopped. Losses are in nats per byte."""

    steps: int
    loss_first: float | None  # None: stopped before a step had a finite loss
    loss_last: float | None
    validation_loss_first: float
    validation_loss_last: float | None  # the last measured after a step; None: stopped before that
    tokens_per_s: float  # over all steps, validation left out
    longest_stall_s: float  # see `longest_stall`
    seconds: float  # validation included
    skipped_steps: int
    load_cv: float | None  # means over steps and layers; None where no expert was live
    load_max_over_mean: float | None


def train(
    model: LanguageModel,
    dataset: ByteDataset,
    settings: TrainerSettings,
    *,
    observe: Callable[[Progress], None],
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Trains until `settings.steps` are done or `stop` is set, which is looked at between steps.

    Validates on fixed batches before the first step, after the last and every `validate_every` steps. A step
    whose loss or gradient is not finite is skipped; raises UserError after 10 of them in a row.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    began = clock()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    validation = dataset.validation_batches(settings.batch_size, settings.validation_batches)
    record = _Record(settings.batch_size * dataset.context, validation_loss(model, validation))
    last_end = clock()
    while record.steps < settings.steps and not stop.is_set():
        rate = learning_rate(record.steps, settings)
        loss = _step(
            model, dataset.batch(record.steps, settings.batch_size), optimizer, rate, settings.clip_norm
        )
        ended = clock()
        record.add_step(loss, ended - last_end, model.load_spread())
        last_end = ended
        fresh = None
        if record.steps == settings.steps or (
            settings.validate_every and record.steps % settings.validate_every == 0
        ):
            fresh = record.validation_loss_last = validation_loss(model, validation)
            last_end = clock()
        observe(record.progress(settings.steps, loss, fresh))
    return record.summary(clock() - began)


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """Of the step (from 0): rises linearly in `warmup_steps`, then falls as a cosine to a tenth."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    share = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return settings.learning_rate * (_LOWEST_RATE + (1 - _LOWEST_RATE) * share)


@torch.no_grad()
def validation_loss(model: LanguageModel, batches: Sequence[Tensor]) -> float:
    """Mean over the batches, in nats per byte."""
    model.eval()
    losses = [model.loss(tokens).item() for tokens in batches]
    model.train()
    return statistics.fmean(losses)


def longest_stall(intervals_s: Sequence[float]) -> float:
    """How much longer than usual training stood still at worst: the longest interval less the median one.

    An interval is the time between the ends of two consecutive steps. Where losing an expert costs nothing,
    the stall is near 0; where training waited for a lost one, it is that wait. 0 for no intervals.
    """
    return max(intervals_s) - statistics.median(intervals_s) if intervals_s else 0.0


def _step(
    model: LanguageModel, tokens: Tensor, optimizer: torch.optim.Optimizer, rate: float, clip_norm: float
) -> float:
    """One step of the dense part; gives its loss, or NaN when the step was skipped for its gradient."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = model.loss(tokens)
    value: float = loss.item()
    if not math.isfinite(value):
        return value  # no backward: experts would be sent gradients that they must refuse
    balancing = model.balancing_loss()
    torch.autograd.backward(loss if balancing is None else loss + balancing)
    norm: float = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
    if not math.isfinite(norm):
        return math.nan
    optimizer.step()
    return value


class _Record:
    """What has been measured so far."""

    def __init__(self, tokens_in_a_step: int, first_validation_loss: float) -> None:
        self.steps = 0
        self.validation_loss_first = first_validation_loss
        self.validation_loss_last: float | None = None
        self._tokens = tokens_in_a_step
        self._intervals_s = array("d")
        self._rolling_s: deque[float] = deque(maxlen=_ROLLING_STEPS)
        self._spread: LoadSpread | None = None
        self._load_cv = array("d")
        self._load_max_over_mean = array("d")
        self._loss_first: float | None = None
        self._loss_last: float | None = None
        self._skipped = self._skipped_in_a_row = 0

    def add_step(self, loss: float, interval_s: float, spread: LoadSpread | None) -> None:
        self.steps += 1
        self._spread = spread
        if spread is not None:
            self._load_cv.append(spread.cv)
            self._load_max_over_mean.append(spread.max_over_mean)
        self._intervals_s.append(interval_s)
        self._rolling_s.append(interval_s)
        if math.isfinite(loss):
            self._skipped_in_a_row = 0
            self._loss_last = loss
            self._loss_first = loss if self._loss_first is None else self._loss_first
            return
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise UserError(
                f"the loss or its gradient was not finite in {SKIPPED_IN_A_ROW} steps in a row, up to step "
                f"{self.steps}: train with a smaller learning_rate or more warmup_steps"
            )

    def progress(self, steps: int, loss: float, validation_loss: float | None) -> Progress:
        return Progress(
            step=self.steps,
            steps=steps,
            loss=loss,
            validation_loss=validation_loss,
            tokens_per_s=self._rate(self._rolling_s),
            step_s=self._intervals_s[-1],
            load_cv=None if self._spread is None else self._spread.cv,
            load_max_over_mean=None if self._spread is None else self._spread.max_over_mean,
        )

    def summary(self, seconds: float) -> Summary:
        return Summary(
            steps=self.steps,
            loss_first=self._loss_first,
            loss_last=self._loss_last,
            validation_loss_first=self.validation_loss_first,
            validation_loss_last=self.validation_loss_last,
            tokens_per_s=self._rate(self._intervals_s),
            longest_stall_s=longest_stall(self._intervals_s[1:]),  # the first step has no step before it
            seconds=seconds,
            skipped_steps=self._skipped,
            load_cv=_mean(self._load_cv),
            load_max_over_mean=_mean(self._load_max_over_mean),
        )

    def _rate(self, intervals_s: Sequence[float]) -> float:
        """Tokens per second; 0 when no time has passed."""
        passed = sum(intervals_s)
        return self._tokens * len(intervals_s) / passed if passed > 0 else 0.0


def _mean(numbers: Sequence[float]) -> float | None:
    return statistics.fmean(numbers) if numbers else None
