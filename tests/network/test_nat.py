"""A swarm over real NAT: nodes in homes whose routers admit no connections, in network namespaces of the kernel."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from home_swarm import manifest_in, village_in

from benchmarks.homes import START_S, Program, Village
from benchmarks.namespaces import why_not

STEPS = 4
SLOW = ("--upload-mbit", 1)
"""Without this limit the trainers would use the whole machine while others wait."""
NOT_HERE = why_not()
pytestmark = [
    pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE),
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("p2pd"),
]


@pytest.fixture
def village(tmp_path: Path) -> Iterator[Village]:
    with village_in(tmp_path) as made:
        yield made


def found(village: Village, folder: Path, experts: int = 0) -> str:
    """Founds the swarm on a public node. Returns the invite."""
    manifest = manifest_in(folder)
    founder = village.node(village.net.public(), "--new", manifest, "--experts", experts, "--spare", 0, *SLOW)
    founder.wait_for("an invite", lambda: founder.events("invite"))
    return str(founder.events("invite")[0]["invite"])


def trainer(village: Village, invite: str, text: Path, *arguments: object) -> Program:
    """A trainer in a home, which runs until the end of the test."""
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return village.run(
        village.net.home(), "train", "--join", invite, "--data", text, "--steps", 100_000,
        "--batch-size", 2, "--threads", 1, *arguments,
    )  # fmt: skip


def test_two_homes_and_a_public_peer_train_together(village: Village, tmp_path: Path) -> None:
    invite = found(village, tmp_path)
    homes = [
        village.node(village.net.home(), "--join", invite, "--experts", 2, "--spare", 0, *SLOW)
        for _ in range(2)
    ]
    for home in homes:
        home.wait_until_reached("relayed")
        assert "forward that TCP port" in home.events("state")[-1]["reachability_advice"]
    training = trainer(village, invite, tmp_path / "text.txt")
    training.wait_for("steps", lambda: len(training.events("step")) >= STEPS)
    for home in homes:
        home.wait_until_updated()


def test_a_founder_behind_a_router_learns_that_its_invite_lets_nobody_in(
    village: Village, tmp_path: Path
) -> None:
    manifest = manifest_in(tmp_path)
    founder = village.node(village.net.home(), "--new", manifest, "--experts", 0, "--spare", 0)
    founder.wait_for("an invite", lambda: founder.events("invite"))
    founder.wait_for("advice", lambda: "nobody outside this network can join by this invite" in founder.said)


@pytest.mark.slow
def test_two_trainers_in_homes_average(
    village: Village, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALKOOT_TRAIN_ANNOUNCE_EVERY_S", "1")
    invite = found(village, tmp_path, experts=4)
    trainers = [trainer(village, invite, tmp_path / "text.txt", "--average-every", 2) for _ in range(2)]

    def have_averaged() -> bool:
        return all((steps := t.events("step")) and steps[-1]["averagings"] > 0 for t in trainers)

    deadline = time.monotonic() + 2 * START_S
    while not have_averaged():
        assert all(trainer.process.poll() is None for trainer in trainers), [t.said for t in trainers]
        assert time.monotonic() < deadline, [trainer.said for trainer in trainers]
        time.sleep(0.2)
