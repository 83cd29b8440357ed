"""Pages of other sites, open in the browser of somebody who runs the dashboard or serves a model, and malformed
requests, over real sockets.
"""

import asyncio
import logging
import socket
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from talkoot.web import BrowserProtection, address_of, serving


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("a secret")(scope, receive, send)


def status(host: str, headers: dict[str, str], method: str = "GET") -> int:
    """`host`: the address that the server says it listens on."""

    async def scenario() -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        app = BrowserProtection(answer, host, PlainTextResponse("refused", 421))
        async with serving(app, listener), httpx.AsyncClient() as client:
            return (await client.request(method, address_of(listener), headers=headers)).status_code

    return asyncio.run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.7"])
@pytest.mark.parametrize("destination", ["empty", "image", "script", "iframe", ""])
def test_what_another_sites_page_requests_is_refused(host: str, destination: str) -> None:
    """It could not read the answer, but it could take all streams that keep pages up to date."""
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": destination}
    assert status(host, headers) == 421


def test_no_other_sites_form_is_taken() -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert status("127.0.0.1", headers, "POST") == 421


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin", "sec-fetch-dest": "empty"},
        {"sec-fetch-site": "none", "sec-fetch-dest": "document"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    ],
    ids=["a program", "its own page", "typed by hand", "a link"],
)
def test_programs_own_pages_and_links_are_answered(headers: dict[str, str]) -> None:
    assert status("127.0.0.1", headers) == 200


@pytest.mark.parametrize(
    "head", ["no request", "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: a"]
)
def test_malformed_requests_write_nothing_to_the_log(head: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="uvicorn.error")

    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        async with serving(answer, listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(f"{head}\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 ")
            writer.close()

    asyncio.run(scenario())
    assert caplog.text == ""
