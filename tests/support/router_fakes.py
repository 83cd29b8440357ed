"""A trainer's mixtures over a swarm without a network, with any router, and experts that learn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import pytest
import torch
from expert_fakes import ExpertWork, FakeSwarm, virtual_time

from dht.manifest import Manifest
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from peer.codec import Floats
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import ROUTERS, Routing
from trainer_client.settings import RouterName

BALANCE_STATE = ["balance.average_bias", "balance.average_load", "balance.bias"]
every_router = pytest.mark.parametrize("name", get_args(RouterName))
every_kind = pytest.mark.parametrize("kind", ["transformer", pytest.param("ffn", marks=pytest.mark.slow)])


class LearningSwarm(FakeSwarm):
    """A swarm whose experts take optimizer steps."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest, peers=4)
        self.experts = {uid: Expert(uid, manifest) for uid in manifest.uids()}

    def compute(self, direction: Direction, work: ExpertWork) -> Floats:
        inputs = torch.from_numpy(work.inputs.copy())
        lengths, positions = torch.from_numpy(work.lengths), torch.from_numpy(work.positions)
        expert = self.experts[work.uid]
        if direction == "forward":
            answer: Floats = expert.forward(Rows(inputs, lengths, positions)).numpy()
            return answer
        assert work.gradients is not None
        gradients = torch.from_numpy(work.gradients.copy())
        with torch.enable_grad():
            (gradient_RD,), _ = expert.backward([Rows(inputs, lengths, positions, gradients)])
        gradient: Floats = gradient_RD.numpy()
        return gradient


def k_of(name: RouterName) -> int:
    return ROUTERS[name].k or 3


@contextmanager
def mixtures(
    swarm: FakeSwarm,
    name: RouterName,
    choose_by: Literal["token", "sequence"] = "token",
    gradient_scale: Callable[[], float] | None = None,
    routing_prefix: int = 0,
    **routing: Any,
) -> Iterator[Callable[[int], RemoteMixtureOfExperts]]:
    """A function that makes the layers of a trainer, which calls this swarm in virtual time."""
    how = Routing(name, k_of(name), choose_by, routing_prefix, **routing)
    with virtual_time() as runner:
        dispatcher = Dispatcher(
            swarm.directory(), swarm, WaitPolicy(10.0, 0.0, 1), clock=runner.get_loop().time
        )
        yield lambda layer: RemoteMixtureOfExperts(
            layer, swarm.manifest, dispatcher, runner.run, how, gradient_scale
        )
        runner.run(dispatcher.close())
