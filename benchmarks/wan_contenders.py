"""One mixture layer behind emulated links: one contender of `benchmarks.wan`, which starts this module.

Case `full` has tiny experts and large batches, so that the link is the limit. Case `delay` has the Transformer experts
of `benchmarks.moe`, so that computing is the limit, and repeats this with calls that fail. All calls of a trainer go
over the links, and each node is behind a link of its own.
"""

import argparse
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from grpc import StatusCode
from torch import nn

from benchmarks.emulated import EmulatedLinks, emulated_links
from benchmarks.moe_contenders import make_step
from benchmarks.rival_blocks import SEQUENCE
from benchmarks.scratch import scratch_folder
from benchmarks.village import START_LIMIT_S, joining_node, running_node
from benchmarks.wan_pace import Carried, MeasuringTurns, auto_pace_of, pace_of
from peer.codec import CodecName, codec_of
from peer.errors import ExpertError
from peer.metrics import total
from talkoot.demo.links import free_ports
from trainer_client.dispatch.batches import CallReply, NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller

if TYPE_CHECKING:
    from trainer_client.client import SwarmClient
    from trainer_client.moe import RemoteMixtureOfExperts

GRID = (4, 4)
TOP_K = 4
SHAPES = {"full": (64, 1, 4096), "delay": (16, SEQUENCE, 256)}
"""There are few samples, since hivemind.moe searches experts for one sample after another."""
KINDS = {"full": "ffn", "delay": "rival-transformer"}
RIVAL_KINDS = {"full": "nop", "delay": "transformer"}
_HOST = "127.0.0.1"
_NO_LINK = "0ms"
_CALL_LIMIT_S = 120.0
_CODECS: tuple[CodecName, ...] = ("int8", "int4")
"""The codecs that are compared with fp32 on a full link."""
_ALL_STARTED_S = 40.0
AUTO_LIMIT = 32
"""The trainer's default limit of steps in flight."""

MANIFEST = """
name = "benchmark"
preset = "none"
[model]
layers = 1
hidden = {hidden}
context = {context}
feed_forward = 8
[experts]
grid = [4, 4]
kind = "{kind}"
[routing]
top_k = {top_k}
[optimizer]
weight_decay = 0.0
"""

Mixture = Callable[[torch.Tensor], torch.Tensor]


def shape_of(options: argparse.Namespace) -> tuple[int, int, int]:
    samples, rows, hidden = SHAPES[options.case]
    return options.samples or samples, rows, hidden


def run_case(
    options: argparse.Namespace,
    mixture: Mixture,
    links: EmulatedLinks,
    failing: "Failing",
    carried: Carried,
    use_codec: Callable[[CodecName], None] | None = None,
    make_mixture: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Runs the case that `options` names. `make_mixture`: makes a mixture for each step in flight, where their number
    is that which a trainer would choose.
    """
    shape = shape_of(options)
    pace: Callable[[], dict[str, float]]
    if options.in_flight == "auto" and make_mixture is not None:

        def step(own: nn.Module) -> None:
            make_step(own, shape)()

        pace = partial(auto_pace_of, make_mixture, step, shape[0], options.seconds, AUTO_LIMIT, carried)
    else:
        count = 1 if options.in_flight == "auto" else options.in_flight
        pace = partial(pace_of, make_step(mixture, shape), shape[0], options.seconds, count, carried)
    results: dict[str, Any] = {}
    if options.case == "full":
        results["fp32"] = pace()
        if use_codec is not None:
            for codec in _CODECS:
                use_codec(codec)
                results[codec] = pace()
        return results
    for delay in options.delays.split(","):
        links.change(f"{delay}ms")
        results[f"{delay}_ms"] = pace()
    links.change(_NO_LINK)
    failing.share = options.failing
    results["failing"] = pace()
    failing.share = 0.0
    return results


class Failing:
    """Makes a share of the calls fail before they are sent."""

    def __init__(self) -> None:
        self.share = 0.0
        self.caller: GrpcCaller | None = None
        """The caller that made the last call."""
        self._rng = random.Random(0)

    def next(self) -> bool:
        return self._rng.random() < self.share

    @contextmanager
    def of_talkoot(self) -> Iterator[None]:
        whole = GrpcCaller.call

        async def call(caller: GrpcCaller, call: NodeCall) -> AsyncGenerator[CallReply, None]:
            self.caller = caller
            if self.next():
                raise ExpertError(StatusCode.UNAVAILABLE, "fails on purpose")
            async for reply in whole(caller, call):
                yield reply

        with patch.object(GrpcCaller, "call", call):
            yield

    @contextmanager
    def of_hivemind(self) -> Iterator[None]:
        from hivemind.moe.client import moe

        def wrapped(whole: Callable[..., Any]) -> Callable[..., Any]:
            async def call(*arguments: Any) -> Any:
                if self.next():
                    raise ConnectionError("fails on purpose")
                return await whole(*arguments)

            return call

        with (
            patch.object(moe, "expert_forward", wrapped(moe.expert_forward)),
            patch.object(moe, "expert_backward", wrapped(moe.expert_backward)),
        ):
            yield


def run_talkoot(options: argparse.Namespace) -> dict[str, Any]:
    """Starts nodes in processes of their own with the command. This process is the trainer."""
    from trainer_client.client import SwarmClient
    from trainer_client.settings import TrainerSettings

    count = options.nodes
    each = GRID[0] * GRID[1] // count
    manifest = MANIFEST.format(
        hidden=SHAPES[options.case][2], context=SEQUENCE, kind=KINDS[options.case], top_k=TOP_K
    )
    targets = [free_ports(_HOST, 1) for _ in range(count)]
    settings = TrainerSettings(call_deadline_s=_CALL_LIMIT_S, grace_s=_CALL_LIMIT_S)
    failing = Failing()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        links = stack.enter_context(emulated_links(options.link, targets))
        flags = [_behind(*ways, folder) for ways in zip(targets, links.ports, strict=True)]
        founder = stack.enter_context(running_node(manifest, each, flags[0]))
        for number in range(1, count):
            stack.enter_context(joining_node(founder, number, each, flags[number]))
        stack.enter_context(failing.of_talkoot())
        client = stack.enter_context(SwarmClient(founder.invite, settings, founder.folder / "trainer"))
        client.wait_for_experts(START_LIMIT_S, lambda text: None)
        mixture = make_mixture(client)

        def payload() -> tuple[int, int]:
            caller = failing.caller  # It is None before the first call.
            if caller is None:
                return 0, 0
            moved = caller.metrics.bytes
            return int(total(moved, direction="sent")), int(total(moved, direction="received"))

        def use_codec(codec: CodecName) -> None:
            assert failing.caller is not None
            failing.caller._codec = codec_of(codec)  # chosen per call: a node knows all

        with turns_of(options).turn(f"talkoot-{options.case}"):
            results = run_case(
                options, mixture, links, failing, payload, use_codec, partial(make_mixture, client)
            )
        counts = client.dispatcher.metrics.values()
        return results | {name: counts[name] for name in ("failures", "unanswered_rows", "late_gradients")}


def make_mixture(client: "SwarmClient") -> "RemoteMixtureOfExperts":
    return client.mixture(0, choose_by="sequence")


def turns_of(options: argparse.Namespace) -> MeasuringTurns:
    return MeasuringTurns(options.turns, options.contenders, _ALL_STARTED_S)


def _behind(ports: Sequence[int], proxies: Sequence[int], folder: Path) -> list[str]:
    """The flags with which a node listens on `ports` but announces the proxies' ports."""
    config = folder / f"{ports[0]}.toml"
    config.write_text(f"announce_port = {proxies[0]}\n")
    flags = ["--config", str(config), "--port", str(ports[0])]
    return [*flags, "--spare", "0", "--drain-timeout", "0", "--niceness", "0"]


def run_hivemind(options: argparse.Namespace) -> dict[str, Any]:
    """Starts hivemind.moe's server in the background, as its own tests do. This process is the client."""
    from hivemind import DHT
    from hivemind.moe import RemoteMixtureOfExperts
    from hivemind.moe.server.dht_handler import get_experts
    from hivemind.moe.server.server import background_server

    uids = [f"expert.{i}.{j}" for i in range(GRID[0]) for j in range(GRID[1])]
    (port,) = free_ports(_HOST, 1)
    failing = Failing()
    with (
        emulated_links(options.link, [[port]]) as links,
        background_server(
            expert_uids=uids,
            expert_cls=RIVAL_KINDS[options.case],
            hidden_dim=SHAPES[options.case][2],
            device="cpu",
            optim_cls=partial(torch.optim.Adam, lr=1e-3),
            num_handlers=os.cpu_count(),  # its default of eight for each expert is several times slower on few cores
            host_maddrs=[f"/ip4/{_HOST}/tcp/{port}"],
            announce_maddrs=[f"/ip4/{_HOST}/tcp/{links.ports[0][0]}"],
        ) as server,
        failing.of_hivemind(),
    ):
        dht = DHT(initial_peers=server.addrs, start=True, client_mode=True)
        try:
            while None in get_experts(dht, uids):  # else its beam search remembers that there are none
                time.sleep(0.5)
            layer = RemoteMixtureOfExperts(
                in_features=SHAPES[options.case][2],
                grid_size=GRID,
                dht=dht,
                uid_prefix="expert.",
                k_best=TOP_K,
            )
            mask = torch.zeros(shape_of(options)[:2], dtype=torch.bool)

            def mixture(x_BTD: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = (
                    layer(x_BTD.squeeze(1)) if options.case == "full" else layer(x_BTD, mask)
                )
                return output

            with turns_of(options).turn(f"hivemind-{options.case}"):
                return run_case(options, mixture, links, failing, links.carried)
        finally:
            dht.shutdown()


def in_flight(text: str) -> int | str:
    return text if text == "auto" else int(text)


CONTENDERS = {"talkoot": run_talkoot, "hivemind": run_hivemind}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("case", choices=SHAPES)
    parser.add_argument("--nodes", type=int, default=1, help="of Talkoot")
    parser.add_argument("--samples", type=int, default=None, help="in a batch")
    parser.add_argument("--link", default=_NO_LINK)
    parser.add_argument("--delays", default="0", help="milliseconds, with commas")
    parser.add_argument("--failing", type=float, default=0.1)
    parser.add_argument("--in-flight", type=in_flight, default=1, metavar="N|auto")
    parser.add_argument("--turns", type=Path, help="folder of those that measure one after another")
    parser.add_argument("--contenders", type=int, default=1, help="how many those are")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    print(json.dumps(CONTENDERS[options.contender](options)))


if __name__ == "__main__":
    main()
