"""A swarm for the benchmarks: its nodes are started with the command, and stopped when the block ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scratch import scratch_folder
from dht.invites import Invite
from peer.platform.processes import die_with_parent

START_LIMIT_S = 60.0
_RIVALS = {
    "rival-ffn": "benchmarks.rival_blocks:RivalFeedForward",
    "rival-transformer": "benchmarks.rival_blocks:RivalTransformer",
}


@dataclass(frozen=True)
class RunningNode:
    """A running node that serves its experts."""

    invite: Invite
    folder: Path
    """A folder for the benchmark's own files. It is removed when the node is stopped."""
    pid: int
    start_s: float
    """Seconds from the command until the experts are served and announced."""
    leave: Callable[[], None]
    """Asks the node to stop. The end of the block does so too, and waits for it."""


@contextmanager
def running_node(manifest: str, experts: int, options: Sequence[str] = ()) -> Iterator[RunningNode]:
    """Founds a swarm with this manifest (TOML). Its experts may be of hivemind's kinds. Raises SystemExit if the node
    does not start.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        (folder / "swarm.toml").write_text(manifest)
        flags = ["--new", str(folder / "swarm.toml"), "--invite-file", str(folder / "invite"), *options]
        began = time.monotonic()
        node = stack.enter_context(_process(folder / "node", experts, flags))
        wait_for(folder / "invite", node, folder / "node.log")
        invite = Invite.parse((folder / "invite").read_text())
        yield RunningNode(invite, folder, node.pid, time.monotonic() - began, node.terminate)


@contextmanager
def running_village(
    manifest: str, nodes: int, experts_each: int, options: Sequence[str] = ()
) -> Iterator[RunningNode]:
    """Like `running_node`, with more nodes that join the first. Yields the first node, once all serve."""
    with ExitStack() as stack:
        founder = stack.enter_context(running_node(manifest, experts_each, options))
        joined = []
        for number in range(1, nodes):
            file = founder.folder / f"invite-{number}"  # a node writes it once it serves
            joining = joining_node(founder, number, experts_each, [*options, "--invite-file", str(file)])
            joined.append((stack.enter_context(joining), file))
        for node, file in joined:
            wait_for(file, node, file.with_name(file.name.replace("invite", "node") + ".log"))
        for leave in (founder.leave, *(node.terminate for node, _ in joined)):
            stack.callback(leave)  # All nodes are asked at once.
        yield founder


@contextmanager
def joining_node(
    founder: RunningNode, number: int, experts: int, options: Sequence[str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """Starts another node of the swarm, and does not wait for it."""
    state = founder.folder / f"node-{number}"
    with _process(state, experts, ["--join", str(founder.invite), *options]) as node:
        yield node


@contextmanager
def _process(state: Path, experts: int, flags: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
    package = offer_kinds(state.with_suffix(".kinds"), _RIVALS)
    command = [sys.executable, "-m", "talkoot", "node", "--host", "127.0.0.1", "--experts", str(experts)]
    with state.with_suffix(".log").open("wb") as log:
        node = subprocess.Popen(
            die_with_parent([*command, "--state", str(state), *flags]),
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(package)])},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield node
    except BaseException:
        node.kill()  # A user who stops a benchmark does not want to wait until nodes have left in order.
        raise
    finally:
        node.terminate()
        node.wait()


def offer_kinds(folder: Path, kinds: Mapping[str, str]) -> Path:
    """Writes what installing a package of expert kinds would write, for processes that have the folder on their path.
    Returns the folder. `kinds`: MODULE:CLASS of each.
    """
    package = folder / "talkoot_benchmarks-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: talkoot-benchmarks\nVersion: 1\n")
    lines = [f"{kind} = {where}\n" for kind, where in kinds.items()]
    (package / "entry_points.txt").write_text("".join(["[talkoot.expert_kinds]\n", *lines]))
    return folder


def wait_for(invite: Path, node: "subprocess.Popen[bytes]", log: Path) -> None:
    began = time.monotonic()
    while not invite.exists():
        if node.poll() is not None or time.monotonic() - began > START_LIMIT_S:
            raise SystemExit(f"a node did not start:\n{log.read_text()}")
        time.sleep(0.02)
