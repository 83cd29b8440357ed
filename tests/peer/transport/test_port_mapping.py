"""Forwarding a port by UPnP: what routers are asked, good and hostile ones, and which of their answers are believed."""

import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from ipaddress import IPv4Address

import pytest
from home_router import HomeRouter, serving
from hypothesis import given
from hypothesis import strategies as st
from other_processes import children_with
from pydantic import ValidationError

from peer.transport import port_mapping
from peer.transport.port_mapping import Command, PortMapping, RouterAnswer, ask_router

HOST = "192.168.1.2"
ROUTER, PUBLIC = IPv4Address("192.168.1.1"), IPv4Address("44.1.2.3")
FORWARDS = RouterAnswer(router=ROUTER, address=PUBLIC, port=31337)
needs_miniupnpc = pytest.mark.skipif(sys.version_info >= (3, 14), reason="miniupnpc has no wheels for 3.14")


class Router:
    """A router that gives these answers in turn, and then the last one again and again."""

    def __init__(self, *answers: RouterAnswer) -> None:
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.asked: list[tuple[Command, Sequence[int]]] = []

    async def __call__(
        self, command: Command, host: str, port: int, external: Sequence[int] = ()
    ) -> RouterAnswer:
        self.asked.append((command, [*external]))
        return next(self._answers)


async def asked(mapping: PortMapping, router: Router, times: int) -> None:
    keeping = asyncio.create_task(mapping.keep())
    try:
        async with asyncio.timeout(60):
            while len(router.asked) < times:
                mapping.renew()
                await asyncio.sleep(0)
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


async def ask_all(routers: Sequence[HomeRouter], port: int, external: Sequence[int]) -> list[RouterAnswer]:
    """Asks routers, each of which is at its own loopback address."""

    async def one(number: int, router: HomeRouter) -> RouterAnswer:
        host = f"127.{port % 251}.{external[0] % 251}.{number + 1}"
        async with serving(router, host):
            return await ask_router("map", host, port, external)

    return await asyncio.gather(*itertools.starmap(one, enumerate(routers)))


@needs_miniupnpc
def test_the_first_port_that_is_free_or_leads_here_already_is_forwarded() -> None:
    free = HomeRouter()
    taken = HomeRouter(entries={31337: ("127.9.9.9", 31337, 0)})
    conflict = HomeRouter(conflicts=frozenset({31337}))
    permanent = HomeRouter(only_permanent=True)
    full = HomeRouter(conflicts=frozenset({31337, 40000}))
    shared = HomeRouter(address="100.64.0.7")
    double = HomeRouter(address="10.0.0.7")
    routers = [free, taken, conflict, permanent, full, shared, double]
    answers = asyncio.run(ask_all(routers, 31337, [31337, 40000]))
    assert [answer.port for answer in answers] == [31337, 40000, 40000, 31337, None, None, None]
    assert free.entries[31337][1:] == (31337, 3600)
    assert permanent.entries[31337][1:] == (31337, 0)
    assert taken.entries[31337][0] == "127.9.9.9"
    assert "are taken" in answers[4].in_words
    assert all("no public address" in answer.in_words for answer in answers[5:])
    assert not shared.entries
    assert answers[0].external == "44.1.2.3:31337"


@needs_miniupnpc
def test_a_hostile_router_has_not_answered_and_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(port_mapping._DEADLINE_S, "map", 4.0)
    routers = [
        HomeRouter(answers=((b"<a>" * 20_000, 0.0) for _ in itertools.count())),
        HomeRouter(answers=((b"<root>", 0.2) for _ in itertools.count())),
        HomeRouter(answers=[(b"\xff\x00" * 1000, 0.0)]),
        HomeRouter(answers=[(b"", 600.0)]),
        HomeRouter(address="fe80::1"),
        HomeRouter(address="44.1.2.3 or so"),
        HomeRouter(address="A" * 100_000),
    ]
    began = time.monotonic()
    assert asyncio.run(ask_all(routers, 31338, [31338])) == [RouterAnswer()] * len(routers)
    assert time.monotonic() - began < 60.0
    assert not children_with("upnp.py")


@given(st.binary(max_size=300))
def test_only_an_answer_in_the_grammar_is_read(said: bytes) -> None:
    try:
        answer = RouterAnswer.model_validate_json(said)
    except ValidationError:
        return
    assert answer.port is None or 1 <= answer.port <= 65535


@pytest.mark.parametrize(
    "said",
    [
        '{"port": 0}',
        '{"port": "80"}',
        '{"port": 70000}',
        '{"address": "::1"}',
        '{"router": "x"}',
        '{"a": 1}',
        "[]",
        "",
    ],
)
def test_an_answer_of_the_wrong_type_is_refused(said: str) -> None:
    with pytest.raises(ValidationError):
        RouterAnswer.model_validate_json(said)


def test_one_lost_answer_changes_nothing_and_two_do() -> None:
    async def scenario(misses: int) -> str | None:
        router = Router(FORWARDS, *[RouterAnswer()] * misses)
        mapping = PortMapping(HOST, 31337, router)
        await asked(mapping, router, 1 + misses)
        return mapping.external

    assert asyncio.run(scenario(1)) == "44.1.2.3:31337"
    assert asyncio.run(scenario(2)) is None


def test_another_address_or_a_refusal_holds_at_once() -> None:
    moved = RouterAnswer(router=ROUTER, address=IPv4Address("44.1.2.9"), port=31337)
    refused = RouterAnswer(router=ROUTER, address=PUBLIC, refusal="Action not authorized")

    async def scenario(then: RouterAnswer) -> tuple[str | None, str]:
        router = Router(FORWARDS, then)
        mapping = PortMapping(HOST, 31337, router)
        await asked(mapping, router, 2)
        return mapping.external, mapping.in_words

    assert asyncio.run(scenario(moved))[0] == "44.1.2.9:31337"
    external, words = asyncio.run(scenario(refused))
    assert external is None
    assert "Action not authorized" in words


def test_the_port_that_was_forwarded_is_asked_for_first_and_taken_back_once() -> None:
    async def scenario() -> Router:
        own, other, *_ = PortMapping(HOST, 31337, Router(RouterAnswer()))._candidates
        assert own == 31337
        router = Router(RouterAnswer(router=ROUTER, address=PUBLIC, port=other), RouterAnswer())
        mapping = PortMapping(HOST, 31337, router)
        await asked(mapping, router, 2)
        await mapping.end()
        await mapping.end()
        assert router.asked[1][1][0] == other
        assert router.asked[2:] == [("unmap", [other])]
        return router

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "helps"),
    [
        ("192.168.1.2", True),
        ("100.64.0.7", True),
        ("44.1.2.3", False),
        ("127.0.0.1", False),
        ("fd00::1", False),
    ],
)
def test_only_a_machine_with_a_private_address_asks(host: str, helps: bool) -> None:
    assert PortMapping.helps(host) is helps


def test_python_without_miniupnpc_asks_no_router() -> None:
    """miniupnpc is missing for Python 3.14, for example. Here -S hides the installed package."""
    program = [sys.executable, "-I", "-S", str(port_mapping._PROGRAM), "look", HOST, "31337"]
    ended = subprocess.run(program, capture_output=True, timeout=240, check=True)
    answer = RouterAnswer.model_validate_json(ended.stdout)
    assert answer.external is None
    assert answer.in_words.startswith("no router is asked: miniupnpc is not installed: use Python 3.13")
