"""Training through tunnels to homes behind routers that admit no connections, compared with nodes that are public.

There are two swarms on one emulated internet, in network namespaces of the kernel. In one, both nodes are behind
routers of their own and are reached through a public peer that relays; in the other both are public. The trainer is
behind a router, too. It trains with the two swarms in turns, and with the hidden nodes in two ways: through tunnels
that p2pd opens, and, with p2pd off, through the relay over gRPC.

    python -m benchmarks.tunnel [--quick] [--json FILE] [--link 100mbit,20ms]

Each machine has a link of this rate to all others, in each direction, which the kernel enforces. The delay is the round
trip between trainer and nodes, whether there is a relay between them or not. Needs root, and iproute2, nftables and
procps.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.emulated import emulated_links
from benchmarks.homes import START_S, Program, Village
from benchmarks.namespaces import Internet, Machine, internet, why_not
from benchmarks.scratch import scratch_folder
from talkoot.demo.links import Link

SITES = ("direct", "tunnel")
WAYS = (*SITES, "relay")
LEAST_SHARE = 0.50
LEAST_SHARE_OF_TUNNEL = 0.90
PORTS = (4001, 4002)
"""The ports of gRPC and of p2pd. All machines use the same ports, since each has its own address."""
SEQUENCES = 8
_WARM_STEPS = 10
_STEP_LIMIT_S = 10.0
_TURNS, _TURNS_OF_EACH = 10, 2
"""At most so many turns, of which so many with each number of steps in flight. The others lower the error."""
_LEAST_ERROR = 0.03
"""The benchmark ends early once the ratio of relay to tunnel has this standard error."""

MANIFEST = """
name = "{name}"
preset = "none"
[model]
layers = 1
hidden = 128
heads = 2
context = 64
feed_forward = 128
[experts]
grid = [4]
kind = "ffn"
[routing]
top_k = 4
"""
"""With this manifest, every token goes to both nodes."""


@dataclass(frozen=True)
class Site:
    """The machines of a swarm: its public peer without experts, and its two nodes."""

    name: str
    public: Machine
    nodes: tuple[Machine, Machine]
    passes: Link
    """The emulated link in front of each public machine."""

    @classmethod
    def of(cls, net: Internet, link: Link, name: str) -> "Site":
        """The site of the swarm `direct` or `tunnel`. Traffic that is relayed passes the relay's link twice."""
        if name == "direct":
            return cls(name, net.public(), (net.public(), net.public()), Link(None, link.delay_s))
        return cls(name, net.public(), (net.home(), net.home()), Link(None, link.delay_s / 2))


class Swarm:
    """Running nodes, and trainers that start and stop."""

    def __init__(self, site: Site, village: Village, folder: Path, stack: ExitStack) -> None:
        """Starts the nodes. `stack`: closes what delays their traffic."""
        self._site = site
        self._village = village
        self._folder = folder
        self._stack = stack
        manifest = folder / f"{site.name}.toml"
        manifest.write_text(MANIFEST.format(name=site.name))
        founder = self._node(site.public, "--new", manifest, "--experts", 0)
        founder.wait_for("an invite", lambda: founder.events("invite"))
        self._invite = founder.events("invite")[0]["invite"]
        joining = ("--join", self._invite, "--experts", 2)
        self._nodes = [self._node(machine, *joining) for machine in site.nodes]
        for node in self._nodes:
            # Nobody checks whether public nodes are reachable.
            node.wait_until_reached("relayed" if site.name == "tunnel" else "not checked")

    @property
    def reached(self) -> list[str]:
        """What each node reports about how others reach it now."""
        return [str(node.events("state")[-1]["reachability"]) for node in self._nodes]

    def train(self, machine: Machine, steps: int, in_flight: int, p2pd: str = "auto") -> list[float]:
        """Trains after a warm-up, and returns the seconds of each step."""
        text = self._folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
        steps += _WARM_STEPS
        trainer = self._village.run(
            machine, "train", "--join", self._invite, "--data", text, "--steps", steps, "--threads", 1,
            "--batch-size", SEQUENCES, "--in-flight", in_flight, "--grace-s", 10, "--k-min", 4,
            "--checkpoint-every", 0, "--average-every", 0, "--start-from", "fresh", "--p2pd", p2pd,
        )  # fmt: skip
        status = trainer.process.wait(START_S + steps * _STEP_LIMIT_S)
        assert status == 0, trainer.said
        return [event["step_s"] for event in trainer.events("step")[_WARM_STEPS:]]

    def _node(self, machine: Machine, *options: object) -> Program:
        options = (*options, "--spare", 0)
        if machine.is_behind_router:
            return self._village.node(machine, *options)
        links = emulated_links(f"{1000 * self._site.passes.delay_s:g}ms", [PORTS], machine)
        (delayed,) = self._stack.enter_context(links).ports
        self._village.net.redirect(machine, dict(zip(PORTS, delayed, strict=True)))
        config = self._folder / f"{machine.namespace}.toml"
        config.write_text(
            f"port = {PORTS[0]}\np2pd_port = {PORTS[1]}\n"
            "relay_mbit = 1000\n"  # the links limit it, as they limit p2pd's relay
            'reachability = "public"\n'  # who is asked sees the caller at its own address, where the delays are
        )
        return self._village.node(machine, *options, "--config", config)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Samples per second in both swarms, which take turns."""
    with ThreadPoolExecutor(2) as threads, ExitStack() as stack:  # processes die with their starting thread
        folder = stack.enter_context(scratch_folder())
        net = stack.enter_context(internet(options.link.rate_mbit))
        village = stack.enter_context(closing(Village(net, folder)))
        stack.enter_context(console.status("starting"))
        sites = [Site.of(net, options.link, name) for name in SITES]
        home = net.home()
        swarms = dict(
            zip(
                (site.name for site in sites),
                threads.map(lambda site: Swarm(site, village, folder, stack), sites),
                strict=True,
            )
        )
        paces: dict[tuple[str, int], list[float]] = {}
        for turn in range(options.turns):
            for in_flight in options.in_flight if turn < _TURNS_OF_EACH else options.in_flight[:1]:
                for name in WAYS if turn % 2 == 0 else WAYS[::-1]:
                    swarm = swarms["direct" if name == "direct" else "tunnel"]
                    p2pd = "off" if name == "relay" else "auto"
                    seconds = swarm.train(home, options.steps, in_flight, p2pd)
                    pace = SEQUENCES * len(seconds) / sum(seconds)
                    paces.setdefault((name, in_flight), []).append(pace)
            if turn >= _TURNS_OF_EACH and relay_of_tunnel(paces, options.in_flight[0])[1] < _LEAST_ERROR:
                break
        reached = {name: swarm.reached for name, swarm in swarms.items()}
    return {
        "link": options.link_text,
        "reached": reached,
        "rows": [*map(partial(compare, paces), options.in_flight)],
    }


def compare(paces: Mapping[tuple[str, int], Sequence[float]], in_flight: int) -> dict[str, Any]:
    turns = {name: list(paces[name, in_flight]) for name in WAYS}
    direct, tunnel, relay = (statistics.median(turns[name]) for name in WAYS)
    mean, error = relay_of_tunnel(paces, in_flight)
    return {
        "in_flight": in_flight,
        "turns": turns,
        "direct": direct,
        "tunnel": tunnel,
        "relay": relay,
        "share": tunnel / direct,
        "relay_share": relay / direct,
        "relay_of_tunnel": mean,
        "relay_of_tunnel_error": error if math.isfinite(error) else None,
    }


def relay_of_tunnel(paces: Mapping[tuple[str, int], Sequence[float]], in_flight: int) -> tuple[float, float]:
    """The mean ratio of both ways in the same turn, and its standard error, which is infinite after a single turn."""
    ratios = [
        relay / tunnel
        for relay, tunnel in zip(paces["relay", in_flight], paces["tunnel", in_flight], strict=True)
    ]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else math.inf
    return statistics.mean(ratios), error


def show(results: dict[str, Any], console: Console) -> None:
    columns = ("in flight", *WAYS, "tunnel of direct", "relay of direct", "relay of tunnel")
    table = Table(*columns, title=f"samples/s over {results['link']}")
    for row in results["rows"]:
        table.add_row(
            str(row["in_flight"]),
            *(f"{row[name]:.1f}" for name in WAYS),
            *(f"{row[name]:.2f}" for name in ("share", "relay_share", "relay_of_tunnel")),
        )
    console.print(table)
    for name, words in results["reached"].items():
        console.print(f"{name}: nodes are reached: {', '.join(words)}")
    console.print(
        "with many in flight the link is full, and the relay's carries all of it twice: half is the most there"
    )
    row = results["rows"][0]
    error = row["relay_of_tunnel_error"]
    within = "" if error is None else f" ± {error:.2f}"
    for what, share, spread, least in (
        ("tunnel, of direct", row["share"], "", LEAST_SHARE),
        ("relay, of tunnel", row["relay_of_tunnel"], within, LEAST_SHARE_OF_TUNNEL),
    ):
        reached = "reached" if share >= least else "missed"
        console.print(f"{what}, one in flight (target): {share:.2f}{spread} ({least:.2f}) {reached}")


def main() -> None:
    parser = command_parser(__doc__, "one short turn each")
    parser.add_argument(
        "--link", dest="link_text", default="100mbit,20ms", help="rate, and delay there and back"
    )
    options = parser.parse_args()
    end_in_order_when_stopped()
    if reason := why_not():
        parser.exit(2, f"can't emulate an internet: {reason}\n")
    options.link = Link.parse(options.link_text)
    options.turns, options.steps = (1, 30) if options.quick else (_TURNS, 60)
    options.in_flight = (1,) if options.quick else (1, 4)
    console = Console(width=120)
    results = measure(options, console)
    show(results, console)
    write_figures(options.json, results)


if __name__ == "__main__":
    main()
