"""A runtime computes work for several experts of one caller in one batch, with the same results as for each alone."""

import asyncio
from dataclasses import replace

import pytest
import torch
from runtime_samples import HIDDEN, NEVER, make_runtime, make_work, submit, with_runtime

from dht.manifest import ExpertSpec, Manifest, ModelSpec
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import SharedGraph
from expert_server.serving import runtime as runtime_module
from expert_server.serving.batching import Direction, Result, WorkItem
from expert_server.serving.runtime import Runtime
from peer.errors import ExpertError
from peer.metrics import total

MANIFEST = Manifest(
    name="test",
    model=ModelSpec(layers=1, hidden=HIDDEN, heads=2, context=32, feed_forward=32),
    experts=ExpertSpec(grid=(2, 4), kind="transformer"),
)
UIDS = MANIFEST.uids()


def works_of(results: list[Result] | None = None, seed: int = 0) -> list[WorkItem]:
    """Forward works, or the backward works for those results."""
    if results is None:
        works = [make_work(3 + n, uid, seed=seed + n) for n, uid in enumerate(UIDS)]
        return [replace(work, keep=True) for work in works]
    works = [make_work(3 + n, uid, "backward", NEVER, seed + n) for n, uid in enumerate(UIDS)]
    return [
        replace(work, rows=replace(work.rows, graph=result.graph))
        for work, result in zip(works, results, strict=True)
    ]


async def submit_all(runtime: Runtime, works: list[WorkItem]) -> list[Result]:
    return list(await asyncio.gather(*(submit(runtime, work) for work in works)))


def make_experts() -> list[Expert]:
    return [Expert(uid, MANIFEST) for uid in UIDS]


@pytest.mark.parametrize("threads", [1, 4])
def test_what_comes_together_is_computed_together_and_each_takes_its_step(threads: int) -> None:
    experts, alone = make_experts(), make_experts()
    runtime = make_runtime(*experts, threads=threads)

    async def scenario() -> None:
        for step in range(3):
            forward = await submit_all(runtime, works_of(seed=10 * step))
            backward = await submit_all(runtime, works_of(forward, seed=10 * step))
            assert all(isinstance(result.graph, SharedGraph) for result in forward)
            for expert, there, back, work in zip(
                alone, forward, backward, works_of(forward, seed=10 * step), strict=True
            ):
                torch.testing.assert_close(there.tensor, expert.forward(work.rows))
                own = replace(work.rows, graph=None)
                torch.testing.assert_close(back.tensor, expert.backward([own])[0][0], rtol=1e-3, atol=1e-4)
                assert back.update_count == step + 1
        assert total(runtime.metrics.batches) == 6
        assert total(runtime.metrics.updates) == 3 * len(UIDS)

    with_runtime(runtime, scenario)


def test_short_forward_work_for_wide_experts_shares_a_batch_in_which_each_may_fail_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Expert, "grouped_block", None)
    broken, *others = make_experts()
    monkeypatch.setattr(broken, "block", None)
    runtime = make_runtime(broken, *others)

    async def scenario() -> None:
        works = [replace(work, keep=False) for work in works_of()]
        results = await asyncio.gather(*(submit(runtime, work) for work in works), return_exceptions=True)
        assert isinstance(results[0], ExpertError)
        for expert, work, result in zip(others, works[1:], results[1:], strict=True):
            assert isinstance(result, Result)
            torch.testing.assert_close(result.tensor, expert.forward(work.rows))
        assert total(runtime.metrics.batches) == 1

    with_runtime(runtime, scenario)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_long_work_for_wide_experts_shares_no_batch_and_its_results_come_together(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Expert, "grouped_block", None)
    monkeypatch.setattr(runtime_module, "_GATHER_S", 3600.0)
    if direction == "forward":
        monkeypatch.setattr("expert_server.serving.compute._BRIEF", 1)
    runtime, deliveries = make_runtime(*make_experts()), list[int]()
    deliver = runtime._deliver

    def noting() -> None:
        deliveries.append(len(runtime._done))
        deliver()

    monkeypatch.setattr(runtime, "_deliver", noting)

    async def scenario() -> None:
        await submit_all(runtime, [make_work(3, uid, direction) for uid in UIDS])
        assert total(runtime.metrics.batches) == len(UIDS)
        assert deliveries == [len(UIDS)]

    with_runtime(runtime, scenario)


def test_backward_work_waits_a_moment_for_the_rest_of_its_pass() -> None:
    experts = make_experts()
    runtime = make_runtime(*experts)

    async def scenario() -> None:
        forward = await submit_all(runtime, works_of())
        first, *others = works_of(forward)
        calls = [asyncio.create_task(submit(runtime, first))]
        await asyncio.sleep(0)
        calls += [asyncio.create_task(submit(runtime, work)) for work in others]
        await asyncio.gather(*calls)
        assert total(runtime.metrics.batches) == 2

    with_runtime(runtime, scenario)


def test_backward_work_does_not_wait_for_what_never_comes() -> None:
    experts, alone = make_experts(), make_experts()
    runtime = make_runtime(*experts)

    async def scenario() -> None:
        forward = await submit_all(runtime, works_of())
        works = works_of(forward)[:5]
        for expert, work, result in zip(alone, works, await submit_all(runtime, works), strict=False):
            expected = expert.backward([replace(work.rows, graph=None)])[0][0]
            torch.testing.assert_close(result.tensor, expected, rtol=1e-3, atol=1e-4)

    with_runtime(runtime, scenario)


def test_others_do_not_wait_for_the_rest_of_a_callers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a caller that never sends the rest would block an expert for all others."""
    runtime = make_runtime(*make_experts())
    monkeypatch.setattr(runtime_module, "_GATHER_S", 60.0)

    async def scenario() -> None:
        forward = await submit_all(runtime, works_of())
        waits = asyncio.create_task(submit(runtime, works_of(forward)[0]))
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await submit(runtime, make_work(uid=UIDS[0], caller="another"))
            await submit(runtime, make_work(uid=UIDS[0], direction="backward", caller="another"))
        assert not waits.done()
        waits.cancel()

    with_runtime(runtime, scenario)
