"""Keeps the router of a home forwarding a TCP port to this machine, by UPnP (its WANIPConnection service).

The router's answer is a stranger's: it is parsed strictly, and only other peers show whether anybody can connect.
"""

import asyncio
import contextlib
import logging
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peer.platform.processes import die_with_parent
from peer.transport.endpoints import AddressScope, Endpoint, scope_of

logger: logging.Logger = logging.getLogger(__name__)

Command: TypeAlias = Literal["map", "unmap", "look"]

_DEADLINE_S: dict[Command, float] = {"map": 20.0, "unmap": 6.0, "look": 20.0}
"""A search without an answer takes 8 s."""
_RENEW_S = 1800.0
"""Half of the lease, in seconds."""
_AGAIN_S = 600.0
"""How long to wait before asking a router again that did not answer or agree."""
_DOUBT_S = 30.0
"""How long to wait before asking a router again that has agreed before, since its answer may have been lost."""
_OTHER_PORTS = 3
_LOWEST_PORT = 1024
"""Other peers do not dial lower ports."""
_MOST_ANSWER_BYTES = 4096
_MOST_BYTES = 512 * 2**20
"""The limit for the program's address space: ten times what it needs."""
_PROGRAM = Path(__file__).with_name("upnp.py")


class RouterAnswer(BaseModel):
    """The output of `upnp.py`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    router: IPv4Address | None = None
    """The router's address in this network; None: no router answers."""
    address: IPv4Address | None = None
    """The router's address on the internet."""
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] | None = None
    """The external port that leads here."""
    refusal: str = Field(default="", max_length=200)

    @property
    def external(self) -> Endpoint | None:
        """Where the internet reaches this machine; None if it can't."""
        return Endpoint.of(str(self.address), self.port) if self.port and self._has_public_address else None

    @property
    def in_words(self) -> str:
        """The answer in words, such as `the router at 192.168.1.1 forwards port 31337`."""
        if self.router is None:
            return f"no router is asked: {self.refusal}" if self.refusal else "no router answers UPnP"
        if not self._has_public_address:
            return f"the router at {self.router} has no public address, so forwarding helps nobody"
        if self.external is None:
            return f"the router at {self.router} does not forward the port by UPnP ({self.refusal})"
        return f"the router at {self.router} forwards port {self.port}"

    @property
    def _has_public_address(self) -> bool:
        return self.address is not None and scope_of(self.address) is AddressScope.GLOBAL


Ask: TypeAlias = Callable[[Command, str, int, Sequence[int]], Awaitable[RouterAnswer]]


async def ask_router(
    command: Command, host: str, port: int, external_ports: Sequence[int] = ()
) -> RouterAnswer:
    """Runs `upnp.py`, which takes some seconds, and at most 20. An invalid answer counts as none."""
    arguments = map(str, (sys.executable, "-I", _PROGRAM, command, host, port, *external_ports))
    try:
        process = await asyncio.create_subprocess_exec(
            *die_with_parent([*arguments], _MOST_BYTES), stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
        )
    except OSError as error:
        logger.debug("can't ask the router: %s", error)
        return RouterAnswer()
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_DEADLINE_S[command]):
            said = await process.stdout.read(_MOST_ANSWER_BYTES)
            return RouterAnswer.model_validate_json(said)
    except (TimeoutError, ValidationError) as error:
        logger.debug("no answer of a router: %s", error)
        return RouterAnswer()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class PortMapping:
    """One TCP port for the router to forward. Run `keep`, and call `end` when done."""

    def __init__(self, host: str, port: int, ask: Ask = ask_router) -> None:
        """`host`: the IPv4 address at which this machine listens."""
        self._host = host
        self._port = port
        self._ask_router = ask
        self._answer: RouterAnswer | None = None
        self._missed = False
        """Whether the last request got no answer, so that the answer before it still counts."""
        self._wanted = asyncio.Event()
        # the same after a restart, so that a mapping left by a killed process is found and renewed
        others = random.Random(port).sample(range(2**15, 2**16), _OTHER_PORTS)  # noqa: S311  # no secret
        self._candidates = [*([port] if port >= _LOWEST_PORT else []), *others]

    @staticmethod
    def helps(host: str) -> bool:
        """Whether a machine that listens there may be hidden behind a router."""
        try:
            return scope_of(IPv4Address(host)) is AddressScope.PRIVATE
        except ValueError:
            return False

    @property
    def external(self) -> Endpoint | None:
        """Where the internet reaches this machine, according to the router; None if it can't, or that is not
        known yet.
        """
        return None if self._answer is None else self._answer.external

    @property
    def in_words(self) -> str:
        """What the router does, in words; empty until it has been asked."""
        return "" if self._answer is None else self._answer.in_words

    def renew(self) -> None:
        """Asks now rather than later, for example when others can't connect: the router may have restarted."""
        self._wanted.set()

    async def keep(self) -> None:
        """Asks the router now, and again each time half of the lease has passed. Never returns."""
        while True:
            await self.ask()
            self._wanted.clear()
            await self._pause(_DOUBT_S if self._missed else _RENEW_S if self.external else _AGAIN_S)

    async def ask(self) -> None:
        """Asks the router once. If it was forwarding the port, a single missing answer is ignored."""
        answer = await self._ask_router("map", self._host, self._port, self._candidates)
        self._missed = answer.router is None and self.external is not None and not self._missed
        if not self._missed:
            self._note(answer)

    async def end(self) -> None:
        """Stops the forwarding, which takes a second or two. Ending twice is harmless."""
        external, self._answer = self.external, None
        if external is not None:
            await self._ask_router("unmap", self._host, self._port, [external.port])

    def _note(self, answer: RouterAnswer) -> None:
        if answer.in_words != self.in_words:
            logger.info("%s", answer.in_words)
        self._answer = answer
        if answer.port in self._candidates:
            self._candidates.remove(answer.port)
            self._candidates.insert(0, answer.port)  # it is kept even if another one becomes free

    async def _pause(self, longest_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._wanted.wait()
