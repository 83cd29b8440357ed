"""Trainers that take one step after another: a sequence forward and backward through its best live experts.

Both sides of the validation run `train`. As a program, this module is all trainers of the real side in one process: it
reports when they have joined, begins when the file `begin` is in the folder, prints a JSON line for each step, and ends
when it is stopped.

    python -m benchmarks.internet.validation.steady_trainers INVITE FOLDER SCENARIO(JSON)
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.internet.validation.scenario import Scenario
from dht.invites import Invite
from trainer_client.client import SwarmClient
from trainer_client.dispatch.batches import RoutedRows, Segments
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.routers import best
from trainer_client.settings import TrainerSettings

_LAYER = 0
_START_LIMIT_S = 120.0
_LOOK_S = 0.1
BEGIN = "begin"
"""The name of a file in the folder. Trainers begin to train when it exists."""


@dataclass(frozen=True)
class Step:
    """One step of one trainer."""

    trainer: int
    began: float
    """When the step began, by the clock that `train` was given."""
    forward_s: float
    backward_s: float
    rows: int
    answered: float
    """The share of the requested answers that arrived."""


async def train(
    dispatcher: Dispatcher,
    scenario: Scenario,
    trainer: int,
    clock: Callable[[], float],
    note: Callable[[Step], None],
) -> None:
    """Takes steps until it is cancelled. The experts that a step chooses depend only on the scenario and the
    trainer.
    """
    rng = np.random.default_rng((scenario.seed, trainer))
    bias, k, length = scenario.bias(), scenario.top_k, scenario.sequence
    segments = Segments.whole(1, length)
    while True:
        began = clock()
        scores = [
            np.repeat(rng.standard_normal((1, size), dtype=np.float32), length, axis=0)
            for size in scenario.grid
        ]
        inputs = rng.standard_normal((length, scenario.width), dtype=np.float32)
        live = await dispatcher.find(_LAYER, scores, k, bias)
        selection = best(scores, live.tables, k, bias=bias)
        rows = RoutedRows(_LAYER, scenario.grid, inputs, scores, k, segments, keep=True, bias=bias)
        forward = await dispatcher.send(rows, selection, live)
        between = clock()
        gradients = rng.standard_normal(forward.updates.shape, dtype=np.float32)
        await dispatcher.send_back(forward, gradients)
        ended = clock()
        answered = float(forward.answered.mean())
        note(Step(trainer, began, between - began, ended - between, length, answered))
        if ended == began:  # no expert is live
            await asyncio.sleep(0.1)


def settings_of(scenario: Scenario) -> TrainerSettings:
    return TrainerSettings(
        call_deadline_s=scenario.call_deadline_s,
        k_min=1,
        p2pd="off",
        announce_every_s=scenario.announce_every_s,
    )


def _say(event: str, **values: object) -> None:
    # In one write, since several threads print.
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def main() -> None:
    invite, folder, scenario = sys.argv[1], Path(sys.argv[2]), Scenario.of(json.loads(sys.argv[3]))
    with ExitStack() as stack:
        clients = []
        for number in range(scenario.trainers):
            client = SwarmClient(Invite.parse(invite), settings_of(scenario), folder / f"trainer-{number}")
            clients.append(stack.enter_context(client))
        for client in clients:
            client.wait_for_experts(_START_LIMIT_S, lambda text: None)
        _say("ready")
        while not (folder / BEGIN).exists():
            time.sleep(_LOOK_S)
        running = [
            client.submit(
                train(
                    client.dispatcher,
                    scenario,
                    number,
                    time.monotonic,
                    lambda step: _say("step", **asdict(step)),
                )
            )
            for number, client in enumerate(clients)
        ]
        for each in running:
            each.result()


if __name__ == "__main__":
    main()
