"""The training loop: AdamW with warm-up and cosine decay over the dense part of a model."""

import math
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from peer.errors import StateError
from peer.layers import step_size
from peer.optimizer import Optimizer
from trainer_client.averaging.dense_part import SharedParameters, require_bounded, shared_buffers
from trainer_client.balancing import LoadSpread
from trainer_client.model import MixtureModel
from trainer_client.moe import rebalance
from trainer_client.settings import TrainerSettings
from trainer_client.training.in_flight import MAX_IN_FLIGHT, InFlight, InFlightController, staleness_limit
from trainer_client.training.record import History, Progress, Summary, TrainingRecord, Validation


@dataclass(frozen=True)
class _Step:
    """A step. If its loss is not finite, it was skipped; otherwise its gradients were applied."""

    number: int
    """It says which batches the step learns from, from 0."""
    loss: float
    spread: LoadSpread | None
    staleness: int = 0
    in_flight: int = 1


class Batches(Protocol):
    """The training data, in batches that the model's `loss` takes. See `Dataset`."""

    context: int
    sequences: int

    def batch(self, step: int, batch_size: int) -> Any: ...

    def validation_batches(self, batch_size: int, count: int) -> Sequence[Any]: ...

    def bytes_per_token(self, batches: Sequence[Any], first: int) -> float: ...


class ReadSource(Protocol):
    """What a model that reads a memory reads in addition to its batches. For any thread."""

    def training(self, number: int, batch: Any) -> Any:
        """What the model reads with training batch `number`. Waits for it only for a while."""

    def validation(self, batches: Sequence[Any]) -> Sequence[Any]:
        """What the model reads with other batches."""


class Training:
    """A model, its optimizer and the steps done. After `import_state` it continues exactly where the state was
    taken.
    """

    def __init__(
        self,
        model: MixtureModel,
        dataset: Batches,
        settings: TrainerSettings,
        make_copy: Callable[[], MixtureModel] | None = None,
        reads: ReadSource | None = None,
    ) -> None:
        """`make_copy` returns another model with the same shapes, for steps in flight; None: one step at a time.

        `reads`: for a model that reads a memory.
        """
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.history: History = History()
        self.part: SharedParameters = SharedParameters(model)
        """The model's parameters and biases, which are averaged with other trainers'."""
        self.unfinished: tuple[int, ...] = ()
        """The numbers of steps in flight. If training stops now, it continues with them."""
        self._model = model
        self._dataset = dataset
        self._settings = settings
        self._reads = reads
        self._make_copy = make_copy if settings.in_flight != 1 else None
        self._parameters = dict(model.named_parameters())
        self._optimizer = Optimizer(
            self._parameters.values(), "adamw", settings.learning_rate, settings.weight_decay
        )
        self._is_whole = True

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.history.losses)

    def run(
        self,
        observe: Callable[[Progress], None],
        stop: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        validated: Callable[[Validation], None] = lambda validation: None,
        check: Callable[[], None] = lambda: None,
        interrupts: tuple[type[BaseException], ...] = (),
    ) -> Summary:
        """Trains until `settings.steps` are done or `stop` is set, which is checked between steps. `interrupts`:
        exceptions that end training in the middle of a step, for those who can't wait for its end.

        Validates on fixed batches before the first step, after the last and in between (`settings.validates_after`).
        `validated` is called with each result; a resumed run starts with its last earlier one. A step whose loss or
        gradient is not finite is skipped. Raises UserError after 10 of them in a row. `check` is called before each
        optimizer step; if it raises, that step is not taken.
        """
        settings, began = self._settings, clock()
        validation = self._dataset.validation_batches(settings.batch_size, settings.validation_batches)
        read = () if self._reads is None else self._reads.validation(validation)
        tokens = settings.batch_size * settings.accumulate * self._dataset.context
        bytes_per_token = self._dataset.bytes_per_token(validation, self._model.first_scored)
        record = TrainingRecord(tokens, bytes_per_token, self.history)
        if not self.history.validated:
            self._validate(record, validation, read)
        validated(record.last_validation())
        last_end = clock()
        with (
            suppress(*interrupts),
            closing(self._one_by_one(check) if self._make_copy is None else self._in_flight(check)) as steps,
        ):
            while self.step < settings.steps and not stop.is_set():
                step = next(steps)
                ended = clock()
                self.unfinished = tuple(number for number in self.unfinished if number != step.number)
                record.add_step(step.loss, ended - last_end, step.spread, step.staleness, step.in_flight)
                self._is_whole = True
                last_end = ended
                if self.step == settings.steps or settings.validates_after(self.step):
                    self._validate(record, validation, read)
                    validated(record.last_validation())
                    last_end = clock()
                seen = self.step * settings.batch_size * settings.accumulate
                observe(record.progress(settings.steps, step.loss, seen / self._dataset.sequences))
        return record.summary(clock() - began)

    def _validate(self, record: TrainingRecord, batches: Sequence[Any], read: Sequence[Any]) -> None:
        before = self._model.unanswered_rows  # steps in flight are computed by copies of the model
        loss = validation_loss(self._model, batches, read)
        record.add_validation(loss, self._model.unanswered_rows - before)

    def export_state(self) -> dict[str, Tensor] | None:
        """The state after the last complete step; None if the optimizer was interrupted during a step."""
        if not self._is_whole:
            return None
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": moment for key, moment in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return tensors | _history_tensors(self.history)

    def import_state(self, tensors: Mapping[str, Tensor], age: int, unfinished: Sequence[int] = ()) -> None:
        """Restores what `export_state` returned. `age`: the age of `part` at that time. `unfinished`: the numbers of
        the steps that were in flight.

        Raises StateError if it is of another model; then nothing has changed.
        """
        tensors = dict(tensors)
        history = _take_history(tensors)
        model, moments = _split(tensors, self._parameters)
        _check(model, self._model.state_dict())
        require_bounded({name: model[name] for name in shared_buffers(self._model)})
        for name, state in moments.items():
            parameter = self._parameters[name]
            _check(state, {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter})
            if any((state[moment] < 0).any() for moment in ("step", "exp_avg_sq")):
                raise StateError(f"its moments of {name!r:.80} are negative")
        self._model.load_state_dict(model)
        self.part.replace(model, age)
        self._optimizer.replace_state(
            {
                parameter: {key: moment.to(parameter.device, copy=True) for key, moment in state.items()}
                for name, state in moments.items()
                for parameter in [self._parameters[name]]
            }
        )
        self.history = history
        self.unfinished = tuple(unfinished)

    def _numbers(self) -> Iterator[int]:
        """The numbers of the steps to take, so that the run takes each once."""
        after = self.step + len(self.unfinished)
        return islice(chain(self.unfinished, count(after)), self._settings.steps - self.step)

    def _one_by_one(self, check: Callable[[], None]) -> Generator[_Step, None, None]:
        for number in self._numbers():
            computed = self._compute(number, self._model)
            check()
            yield replace(computed, loss=self._apply(self._model, computed.loss))

    def _in_flight(self, check: Callable[[], None]) -> Generator[_Step, None, None]:
        """Yields steps in the order in which they end. If the generator is closed, running steps are lost."""
        settings, make_copy = self._settings, self._make_copy
        assert make_copy is not None
        limit = MAX_IN_FLIGHT if settings.in_flight == "auto" else settings.in_flight
        enough = InFlightController(limit) if settings.in_flight == "auto" else None
        steps: InFlight[MixtureModel, _Step] = InFlight(self._model, make_copy, limit)
        numbers = self._numbers()
        try:
            while True:
                wanted = limit if enough is None else min(enough.count, staleness_limit(self.step))
                for number in islice(numbers, max(0, wanted - len(steps))):
                    steps.begin(partial(self._compute, number))
                    self.unfinished = tuple(dict.fromkeys((*self.unfinished, number)))
                in_flight, finished = len(steps), steps.next()
                check()
                loss = self._apply(finished.copy, finished.result.loss)
                steps.release(finished, updated=math.isfinite(loss))
                if enough is not None:
                    enough.note(finished.seconds, finished.ended_at, finished.alone)
                yield replace(finished.result, loss=loss, staleness=finished.staleness, in_flight=in_flight)
        finally:
            steps.close()

    def _compute(self, number: int, model: MixtureModel) -> _Step:
        """Computes the gradients of step `number` (from 0) into the parameters of `model`."""
        settings, losses = self._settings, []
        model.zero_grad()
        model.begin_step(number)
        for part in range(settings.accumulate):
            batch = number * settings.accumulate + part
            learned = self._dataset.batch(batch, settings.batch_size)
            read = () if self._reads is None else (self._reads.training(batch, learned),)
            losses.append(self._add_gradients(model, learned, *read))
            if not math.isfinite(losses[-1]):
                return _Step(number, losses[-1], model.load_spread())
        return _Step(number, statistics.fmean(losses), model.load_spread())

    def _apply(self, computed: MixtureModel, loss: float) -> float:
        """Takes the optimizer's step with the gradients of `computed`, and returns the loss: NaN if the gradient is not
        finite. If the loss or the gradient is not finite, nothing changes.
        """
        self._optimizer.learning_rate = learning_rate(self.step, self._settings)
        if not math.isfinite(loss):
            return loss
        norm: float = nn.utils.clip_grad_norm_(computed.parameters(), self._settings.clip_norm).item()
        if not math.isfinite(norm):
            return math.nan
        for own, other in zip(self._model.parameters(), computed.parameters(), strict=True):
            own.grad = other.grad
        self._is_whole = False  # until the step is recorded
        with self.part.stepping():
            self._optimizer.step()
            rebalance(self._model, computed)
        return loss

    def _add_gradients(self, model: MixtureModel, *batch: Any) -> float:
        """Returns the loss of a batch. If it is not finite, there is no backward pass, because experts would
        refuse it.
        """
        settings = self._settings
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = model.loss(*batch)
        value: float = loss.item()
        if math.isfinite(value):
            balancing = model.balancing_loss()
            total = loss if balancing is None else loss + balancing
            torch.autograd.backward(total / settings.accumulate)
        return value


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """The learning rate of a step (from 0): rises linearly for `warmup_steps`, then falls along a cosine to a tenth."""
    return step_size(step, settings.learning_rate, settings.warmup_steps, settings.steps)


@torch.no_grad()
def validation_loss(model: MixtureModel, batches: Sequence[Any], read: Sequence[Any] = ()) -> float:
    """The mean over the batches, in nats per token. `read`: for each batch, what the model reads from a memory, if it
    does.
    """
    model.eval()
    losses = [
        model.loss(*each).item() for each in (zip(batches, read, strict=True) if read else zip(batches))
    ]
    model.train()
    return statistics.fmean(losses)


def _history_tensors(history: History) -> dict[str, Tensor]:
    return {
        "history.losses": torch.from_numpy(np.array(history.losses, np.float64)),
        "history.validated": torch.from_numpy(np.array(history.validated, np.int64)),
        "history.validation_losses": torch.from_numpy(np.array(history.validation_losses, np.float64)),
    }


def _take_history(tensors: dict[str, Tensor]) -> History:
    """Removes the history from the tensors and returns it. Raises StateError."""
    losses, validated, validation_losses = (
        tensors.pop(f"history.{name}", torch.empty(0))
        for name in ("losses", "validated", "validation_losses")
    )
    # a run that has taken no step, as after an import, may not have been validated yet
    if len(validated) != len(validation_losses) or (len(losses) and not len(validated)):
        raise StateError("its history is incomplete")
    return History(
        array("d", losses.tolist()), array("q", validated.tolist()), array("d", validation_losses.tolist())
    )


def _split(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The model's tensors, and the optimizer's for each parameter. Raises StateError."""
    model: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        kind, _, name = full_name.partition(".")
        if kind == "model":
            model[name] = tensor
            continue
        name, _, key = name.rpartition(".")
        if kind != "optimizer" or name not in parameters:
            raise StateError(f"it has {full_name!r:.80}, which this model does not have")
        moments.setdefault(name, {})[key] = tensor
    return model, moments


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises StateError."""
    if other := tensors.keys() ^ expected.keys():
        raise StateError(f"it and this model differ in {min(other)!r:.80}")
    for name, tensor in tensors.items():
        found, wanted = (tensor.shape, tensor.dtype), (expected[name].shape, expected[name].dtype)
        if found != wanted:
            raise StateError(
                f"its {name} is {tuple(found[0])} of {found[1]}, this model's {tuple(wanted[0])}"
            )
