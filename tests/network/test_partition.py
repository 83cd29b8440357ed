"""A swarm splits into two halves and becomes one again: real processes, with a link between every two of them."""

import time
from pathlib import Path

import pytest

from benchmarks.chaos.plan import Plan
from benchmarks.chaos.swarm import ChaosSwarm, until
from peer.loop import LoopThread

PLAN = Plan(nodes=2, trainers=2, layers=1, replicas=1.0, adopts=False, announce_every_s=2.0, drain_s=0.0)
HALF = PLAN.experts // 2
LIFETIME_S = 3 * PLAN.announce_every_s
DEADLINE_S = 120.0
"""The deadline for a busy machine. That the first look after the cut already joins the halves is tested in
test_rejoining.py, without processes.
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # four processes start and end, on a machine that may be busy
@pytest.mark.parametrize("cut_s", [0.0, 90.0])
def test_two_halves_train_on_and_find_each_other_again(
    loop: LoopThread, tmp_path: Path, cut_s: float
) -> None:
    """`cut_s`: how long the cut lasts after the halves have forgotten each other. Connections die after a minute's
    silence.
    """

    async def scenario() -> None:
        swarm = ChaosSwarm(PLAN, tmp_path)
        try:
            await swarm.start()
            await swarm.start_trainers()
            one, other = swarm.trainers.values()

            def seen() -> set[int]:
                return {one.experts_live, other.experts_live}

            assert await until(lambda: seen() == {PLAN.experts}, DEADLINE_S), seen()
            swarm.links.cut(["node-1", "trainer-1"])
            assert await until(lambda: seen() == {HALF}, LIFETIME_S + DEADLINE_S), seen()
            before, began = [len(t.ended_at) for t in (one, other)], time.monotonic()

            def train_on() -> bool:
                done = min(len(t.ended_at) - n for t, n in zip((one, other), before, strict=True))
                return done > 3 and time.monotonic() > began + cut_s

            assert await until(train_on, cut_s + DEADLINE_S)
            swarm.links.mend(["node-1", "trainer-1"])
            assert await until(lambda: seen() == {PLAN.experts}, DEADLINE_S), seen()
        finally:
            await swarm.stop()

    loop.run(scenario(), 590)
