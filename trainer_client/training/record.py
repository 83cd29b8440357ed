"""The figures of a training run: those of each step, and a summary."""

import math
import statistics
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from peer.errors import UserError
from trainer_client.balancing import LoadSpread

SKIPPED_IN_A_ROW = 10
_ROLLING_STEPS = 20


@dataclass(frozen=True)
class Progress:
    """The state of training after a step (from 1). A skipped step has a loss that is not finite."""

    step: int
    steps: int
    epoch: float  # how often the training text has been seen
    loss: float  # nats per token
    # on the held-out text, the next three: None unless measured after this step
    validation_loss: float | None  # nats per token
    perplexity: float | None  # per token
    bits_per_byte: float | None
    tokens_per_s: float  # over the last 20 steps
    step_s: float  # since the end of the step before, without validation
    left_s: float  # to the last step, at the speed of the last 20
    in_flight: int  # steps running when this one ended
    staleness: int  # of its gradient: updates since its parameters were copied
    load_cv: float | None  # of the rows for each live expert; None if none was live: see LoadSpread
    load_max_over_mean: float | None


@dataclass(frozen=True)
class Validation:
    """The loss on the held-out text after `step` steps: 0 before the first."""

    step: int
    loss: float
    """The loss in nats per token."""
    perplexity: float
    """The perplexity per token."""
    bits_per_byte: float
    unanswered_rows: int = 0
    """Rows that no expert answered, in all mixtures; 0 if the run has been resumed since."""


@dataclass(frozen=True)
class Summary:
    """The result of a run. If the run was stopped, it has fewer `steps` than asked for. Losses are in nats per
    token.
    """

    steps: int  # including those before a resume, as do the losses
    resumed_at: int  # steps before this run
    loss_first: float | None  # None: stopped before a step had a finite loss
    loss_last: float | None
    validation_loss_first: float
    validation_loss_last: float | None  # the last measured after a step; None: stopped before that
    perplexity: float | None  # of that validation, like the next
    bits_per_byte: float | None
    tokens_per_s: float  # over all steps of this run, without validation
    longest_stall_s: float  # see `longest_stall`
    seconds: float  # including validation
    skipped_steps: int
    in_flight: float | None  # mean over steps, like the next; None: no step
    staleness: float | None
    load_cv: float | None  # mean over steps and layers; None if no expert was live
    load_max_over_mean: float | None


@dataclass
class History:
    """The losses of all steps, including those before a resume. NaN for skipped steps."""

    losses: "array[float]" = field(default_factory=lambda: array("d"))
    validated: "array[int]" = field(default_factory=lambda: array("q"))
    """The number of steps before each validation."""
    validation_losses: "array[float]" = field(default_factory=lambda: array("d"))

    def validation_loss_of(self, step: int) -> float | None:
        measured = bool(self.validated) and self.validated[-1] == step
        return self.validation_losses[-1] if measured else None


class TrainingRecord:
    """What a run has measured so far."""

    def __init__(self, tokens_in_a_step: int, bytes_per_token: float, history: History) -> None:
        self.history = history
        self._resumed_at = len(history.losses)
        self._tokens = tokens_in_a_step
        self._bytes_per_token = bytes_per_token
        self._intervals_s = array("d")
        self._rolling_s: deque[float] = deque(maxlen=_ROLLING_STEPS)
        self._in_flight = array("q")
        self._staleness = array("q")
        self._spread: LoadSpread | None = None
        self._load_cv = array("d")
        self._load_max_over_mean = array("d")
        self._skipped_in_a_row = 0
        self._unanswered_rows = 0

    @property
    def steps(self) -> int:
        return len(self.history.losses)

    def add_step(
        self,
        loss: float,
        interval_s: float,
        spread: LoadSpread | None,
        staleness: int,
        in_flight: int,
    ) -> None:
        """Raises UserError if too many steps in a row were skipped."""
        self.history.losses.append(loss if math.isfinite(loss) else math.nan)
        self._staleness.append(staleness)
        self._in_flight.append(in_flight)
        self._spread = spread
        if spread is not None:
            self._load_cv.append(spread.cv)
            self._load_max_over_mean.append(spread.max_over_mean)
        self._intervals_s.append(interval_s)
        self._rolling_s.append(interval_s)
        self._skipped_in_a_row = 0 if math.isfinite(loss) else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise UserError(
                f"the loss or its gradient was not finite in {SKIPPED_IN_A_ROW} steps in a row, up to step "
                f"{self.steps}: train with a smaller learning_rate or more warmup_steps"
            )

    def add_validation(self, loss: float, unanswered_rows: int) -> None:
        """A validation after the steps so far."""
        self._unanswered_rows = unanswered_rows
        self.history.validated.append(self.steps)
        self.history.validation_losses.append(loss)

    def last_validation(self) -> Validation:
        """Call it only after a validation."""
        step, loss = self.history.validated[-1], self.history.validation_losses[-1]
        return Validation(step, loss, perplexity(loss), self._bits_per_byte(loss), self._unanswered_rows)

    def progress(self, steps: int, loss: float, epoch: float) -> Progress:
        validation_loss = self.history.validation_loss_of(self.steps)
        return Progress(
            step=self.steps,
            steps=steps,
            epoch=epoch,
            loss=loss,
            validation_loss=validation_loss,
            perplexity=None if validation_loss is None else perplexity(validation_loss),
            bits_per_byte=None if validation_loss is None else self._bits_per_byte(validation_loss),
            tokens_per_s=self._rate(self._rolling_s),
            step_s=self._intervals_s[-1],
            left_s=statistics.fmean(self._rolling_s) * (steps - self.steps),
            in_flight=self._in_flight[-1],
            staleness=self._staleness[-1],
            load_cv=None if self._spread is None else self._spread.cv,
            load_max_over_mean=None if self._spread is None else self._spread.max_over_mean,
        )

    def summary(self, seconds: float) -> Summary:
        finite = [loss for loss in self.history.losses if math.isfinite(loss)]
        validation_losses = self.history.validation_losses
        validated = validation_losses[-1] if self.history.validated[-1] else None
        return Summary(
            steps=self.steps,
            resumed_at=self._resumed_at,
            loss_first=finite[0] if finite else None,
            loss_last=finite[-1] if finite else None,
            validation_loss_first=validation_losses[0],
            validation_loss_last=validated,
            perplexity=None if validated is None else perplexity(validated),
            bits_per_byte=None if validated is None else self._bits_per_byte(validated),
            tokens_per_s=self._rate(self._intervals_s),
            longest_stall_s=longest_stall(self._intervals_s[1:]),  # the first step has no step before it
            seconds=seconds,
            skipped_steps=self.steps - len(finite),
            in_flight=_mean(self._in_flight),
            staleness=_mean(self._staleness),
            load_cv=_mean(self._load_cv),
            load_max_over_mean=_mean(self._load_max_over_mean),
        )

    def _bits_per_byte(self, loss: float) -> float:
        return bits_per_byte(loss, self._bytes_per_token)

    def _rate(self, intervals_s: Sequence[float]) -> float:
        """Tokens per second; 0 if no time has passed."""
        passed = sum(intervals_s)
        return self._tokens * len(intervals_s) / passed if passed > 0 else 0.0


def perplexity(loss: float) -> float:
    """The perplexity of a loss in nats per token: the number of equally likely tokens that would have the same loss."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """The bits per byte of a loss in nats per token: the size to which the model would compress a byte of text.
    Infinite if the tokens stand for no text, as in empty answers.
    """
    return loss / math.log(2) / bytes_per_token if bytes_per_token else math.inf


def longest_stall(intervals_s: Sequence[float]) -> float:
    """How long training stood still at worst: the longest interval minus the median one; 0 for no intervals.

    An interval is the time between the ends of two consecutive steps. If training waited for a lost expert, the stall
    is that wait; otherwise it is near 0.
    """
    return max(intervals_s) - statistics.median(intervals_s) if intervals_s else 0.0


def _mean(numbers: Sequence[float] | Sequence[int]) -> float | None:
    return statistics.fmean(numbers) if numbers else None
