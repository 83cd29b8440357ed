"""Strangers call a server of a model: their requests take bounded memory, and spoil nobody else's answer."""

import asyncio
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from pydantic import ValidationError
from served_model import LIMIT_S, served, small_model

from peer.loop import LoopThread
from talkoot.serve.api import ChatRequest, CompletionRequest, RequestError

ASKED: dict[str, object] = {"model": "village", "prompt": "In the sauna", "max_tokens": 5}


@pytest.fixture(scope="module")
def address(loop: LoopThread) -> Iterator[str]:
    with served(loop, small_model(), max_tokens=10**6) as address:
        yield address


def mistakes(body: bytes) -> str:
    with pytest.raises(RequestError) as refused:
        CompletionRequest.parse(body)
    with pytest.raises(RequestError):
        ChatRequest.parse(body)
    return str(refused.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "village", "prompt": [' + b"-1," * 2**17 + b"0]}", "prompt: "),
        (b'{"model": "village", ' + b",".join(b'"%x": 1' % n for n in range(2**16)) + b"}", "65537 places"),
    ],
    ids=["tokens", "parameters"],
)
def test_a_body_full_of_mistakes_takes_little_memory(body: bytes, said: str) -> None:
    tracemalloc.start()
    try:
        assert said in mistakes(body)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "village", "prompt": "", "logit_bias": [' + b"[]," * 2**18 + b"[]]}",
        b'{"model": "village", "messages": ['
        + b'{"role": "user", "content": [{},{},{},{}]},' * 2**14
        + b"0]}",
        b'{"model": "village", "prompt": "\\"' + b'[\\"' * 2**18 + b"\\",
    ],
    ids=["lists", "objects", "a string without an end"],
)
def test_a_body_of_very_many_lists_is_refused_before_it_is_parsed(body: bytes) -> None:
    """Their parser holds all other threads: it took seconds for 1 MiB of lists, and 65 MB of memory."""
    began = time.thread_time()
    tracemalloc.start()
    try:
        mistakes(body)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize("text", ["[{" * 2**13, '"[\\' * 2**13 + '"', '\\\\"{' * 2**13 + "[\n"])
def test_a_text_may_have_any_number_of_brackets(text: str) -> None:
    body = json.dumps(ASKED | {"prompt": text}).encode()
    assert CompletionRequest.parse(body).prompt == text


@pytest.mark.parametrize("entry", [b"[0]", b"[]", b"-1", b'""', b"{}", b"null"])
def test_of_a_prompt_full_of_mistakes_only_the_first_ones_are_looked_at(entry: bytes) -> None:
    body = b'{"model": "village", "prompt": [' + b",".join([entry] * 1000) + b"]}"
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate_json(body)
    assert refused.value.error_count() < 10


def test_no_numbers_of_one_client_break_off_anothers_answer(address: str) -> None:
    odd: list[dict[str, object]] = [
        {"top_p": 1e-300}, {"top_p": 5e-324}, {"temperature": 5e-324}, {"temperature": 1e-44, "top_p": 1e-44},
        {"top_k": 2**31}, {"seed": -(2**63)}, {"logprobs": 20, "top_p": 1e-300}, {"max_tokens": 10**6 + 1},
    ]  # fmt: skip

    async def scenario() -> tuple[list[int], httpx.Response]:
        async with httpx.AsyncClient(timeout=LIMIT_S, trust_env=False) as http:
            url = f"{address}v1/completions"
            honest = asyncio.create_task(http.post(url, json=ASKED | {"max_tokens": 60}))
            statuses = [(await http.post(url, json=ASKED | each)).status_code for each in odd]
            return statuses, await honest

    statuses, answer = asyncio.run(scenario())
    assert statuses == [200] * (len(odd) - 1) + [400]
    assert answer.json()["usage"]["completion_tokens"] == 60


BODY = json.dumps(ASKED).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
FRAMED = {
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "a length of thousands of digits": b"Content-Length: " + b"9" * 5000 + b"\r\n",
    "a length with a sign": b"Content-Length: +5\r\n",
    "a name with a blank": b"Content-Length : 5\r\n",
    "another coding": b"Transfer-Encoding: chunked, identity\r\n",
    "another host": b"Host: evil.example\r\nContent-Length: 5\r\n",
    "a flood of headers": b"".join(b"X-%d: a\r\n" % n for n in range(20_000)),
    "a huge header": b"X: " + b"a" * 2**20 + b"\r\n",
}


@pytest.mark.parametrize("case", FRAMED)
def test_requests_with_two_meanings_are_refused(case: str, address: str) -> None:
    host, port = address.removeprefix("http://").strip("/").split(":")
    # The request may be refused before all of it is read.
    with suppress(ConnectionError), socket.create_connection((host, int(port)), LIMIT_S) as connection:
        connection.sendall(POST % host.encode() + FRAMED[case] + b"\r\n" + BODY)
        assert connection.recv(2**12).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{address}healthz", trust_env=False).status_code == 200
