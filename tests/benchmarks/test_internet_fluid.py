"""Links and processors modelled as fluids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.internet.fluid import WAY, Fluids, Jobs


def make_jobs(ways: list[list[int]], amounts: list[float], starts: list[float], nothing: int) -> Jobs:
    count = len(ways)
    return Jobs(
        np.arange(count),
        np.array([way + [nothing] * (WAY - len(way)) for way in ways], dtype=np.int64).reshape(-1, WAY),
        np.array(amounts, float),
        np.array(starts, float),
        np.full(count, np.inf),
        np.full(count, -1),
    )


def run_all(fluids: Fluids, jobs: Jobs, limit_s: float = 1000.0) -> dict[int, float]:
    fluids.add(jobs)
    ended: dict[int, float] = {}
    while len(ended) < len(jobs.tags) and fluids.now < limit_s:
        tags, at, _ = fluids.step()
        ended.update(zip(tags.tolist(), at.tolist(), strict=True))
    return ended


def test_a_lone_job_ends_exactly_whatever_the_slot() -> None:
    for slot_s in (0.01, 0.3, 5.0):
        fluids = Fluids(np.array([10.0, 4.0]), slot_s)
        ended = run_all(fluids, make_jobs([[0, 1]], [8.0], [0.123], 2))
        assert ended[0] == pytest.approx(2.123)


def test_jobs_share_a_resource_evenly_and_use_what_others_leave() -> None:
    fluids = Fluids(np.array([10.0, 1.0]), 0.01)
    # The second job can take only 1 a second, so the first gets 9.
    ended = run_all(fluids, make_jobs([[0], [0, 1]], [9.0, 1.0], [0.0, 0.0], 2))
    assert ended[0] == pytest.approx(1.0, abs=0.02)
    assert ended[1] == pytest.approx(1.0, abs=0.02)


def test_a_group_gets_what_one_job_gets() -> None:
    fluids = Fluids(np.array([10.0]), 0.01, groups=1)
    jobs = make_jobs([[0], [0], [0]], [5.0, 2.5, 2.5], [0.0] * 3, 1)
    fluids.add(Jobs(jobs.tags, jobs.ways, jobs.amounts, jobs.starts, jobs.ends, np.array([-1, 0, 0])))
    ended: dict[int, float] = {}
    while len(ended) < 3:
        tags, at, _ = fluids.step()
        ended.update(zip(tags.tolist(), at.tolist(), strict=True))
    assert list(ended.values()) == pytest.approx([1.0] * 3, abs=0.02)


def test_a_job_that_is_given_up_leaves_its_share() -> None:
    fluids = Fluids(np.array([10.0]), 0.01)
    jobs = make_jobs([[0], [0]], [10.0, 10.0], [0.0, 0.0], 1)
    fluids.add(Jobs(jobs.tags, jobs.ways, jobs.amounts, jobs.starts, np.array([np.inf, 0.5]), jobs.groups))
    ended: dict[int, float] = {}
    while not ended:
        tags, at, _ = fluids.step()
        ended.update(zip(tags.tolist(), at.tolist(), strict=True))
    assert ended == {0: pytest.approx(1.25, abs=0.03)}


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=WAY, unique=True),
            st.floats(0.1, 20.0),
            st.floats(0.0, 3.0),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_nobody_gets_more_than_there_is(some: list[tuple[list[int], float, float]]) -> None:
    capacity = np.array([5.0, 10.0, 2.0, 40.0])
    ways, amounts, starts = (
        [way for way, _, _ in some],
        [size for _, size, _ in some],
        [at for *_, at in some],
    )
    ended = run_all(Fluids(capacity, 0.05), make_jobs(ways, amounts, starts, 4))
    assert len(ended) == len(some), "every job ends"
    for way, amount, start, number in zip(ways, amounts, starts, range(len(some)), strict=True):
        assert ended[number] >= start + amount / capacity[way].min() - 1e-6
    for resource in range(4):
        mine = [n for n, way in enumerate(ways) if resource in way]
        if mine:
            span = max(ended[n] for n in mine) - min(starts[n] for n in mine)
            # A job begins at the start of a slot, so it is late by at most one slot.
            assert sum(amounts[n] for n in mine) <= capacity[resource] * (span + 0.05) + 1e-6
