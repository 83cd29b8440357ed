"""Many clients at once: no error, fair shares, flat memory."""

import asyncio
import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served_model import LIMIT_S, served, small_model

from peer.loop import LoopThread
from talkoot.serve.access import ApiKeys
from talkoot.serve.model import ServedModel

CLIENTS = 32
ROUNDS = 6
ASKED: dict[str, Any] = {"model": "village", "prompt": "In the sauna", "logprobs": 0, "stream": True}


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return small_model()


async def tokens_of(answer: httpx.Response, most: int) -> int:
    """How many tokens a stream has. It is abandoned after `most`."""
    count = 0
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk
            scored = chunk["choices"][0]["logprobs"]
            count += len(scored["tokens"]) if scored else 0
        if count >= most:
            break
    return count


def test_many_clients_are_answered_alike_and_leave_nothing(loop: LoopThread, model: ServedModel) -> None:
    """Each time, half of them disconnect in the middle of a stream."""

    async def client(http: httpx.AsyncClient, url: str, number: int) -> None:
        leaves = bool(number % 2)
        asked = ASKED | {"max_tokens": 4000 if leaves else 8, "seed": number}
        async with http.stream("POST", url, json=asked) as answer:
            assert answer.status_code == 200
            assert await tokens_of(answer, most=8) >= 8

    async def crowd(url: str) -> list[int]:
        sizes = []
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=LIMIT_S, trust_env=False, limits=limits) as http:
            for _ in range(ROUNDS):
                await asyncio.gather(*(client(http, url, number) for number in range(CLIENTS)))
                gc.collect()
                sizes.append(psutil.Process().memory_info().rss)
        return sizes

    with served(loop, model) as address:
        sizes = asyncio.run(crowd(f"{address}v1/completions"))
    assert sizes[-1] - sizes[1] < 16 * 2**20, [size >> 20 for size in sizes]


def test_a_greedy_client_slows_nobody_down(loop: LoopThread, model: ServedModel, tmp_path: Path) -> None:
    names = ["greedy", "aino", "onni", "helmi"]
    (tmp_path / "keys").write_text("\n".join(f"{name}-key" for name in names))
    got: Counter[str] = Counter()

    async def client(http: httpx.AsyncClient, url: str, name: str, enough: asyncio.Event) -> None:
        headers = {"authorization": f"Bearer {name}-key"}
        async with http.stream("POST", url, json=ASKED | {"max_tokens": 4000}, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    scored = json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]
                    got[name] += len(scored["tokens"]) if scored else 0
                if min(got[modest] for modest in names[1:]) >= 60:
                    enough.set()

    async def crowd(url: str) -> Counter[str]:
        enough = asyncio.Event()
        limits, timeout = httpx.Limits(max_connections=100), httpx.Timeout(LIMIT_S, read=None)
        async with (
            asyncio.timeout(LIMIT_S),
            httpx.AsyncClient(timeout=timeout, trust_env=False, limits=limits) as http,
            asyncio.TaskGroup() as clients,
        ):
            tasks = [clients.create_task(client(http, url, "greedy", enough)) for _ in range(12)]
            while got["greedy"] < 40:  # noqa: ASYNC110  # answers set no event
                await asyncio.sleep(0.01)
            tasks += [clients.create_task(client(http, url, name, enough)) for name in names[1:]]
            while not all(got[name] for name in names):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            before = Counter(got)  # from now on all have a place
            await enough.wait()
            for task in tasks:
                task.cancel()
        return got - before

    with served(loop, model, max_streams=4, api_key_file=tmp_path / "keys") as address:
        shares = asyncio.run(crowd(f"{address}v1/completions"))
    assert shares["greedy"] <= 1.5 * max(shares[name] for name in names[1:])


def test_clients_over_ipv4_of_a_server_that_also_listens_on_ipv6_are_not_one_client() -> None:
    first, second = ({"client": (f"::ffff:192.0.2.{n}", 4711)} for n in (1, 2))
    assert ApiKeys(()).client(first) != ApiKeys(()).client(second)
