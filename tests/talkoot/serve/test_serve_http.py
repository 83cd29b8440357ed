"""What the server does with requests from other programs, good and bad, over real sockets."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served_model import LIMIT_S, served, small_model, without_experts

from dht.memory import Passage
from peer.errors import DataError
from peer.loop import LoopThread
from talkoot.serve import api
from talkoot.serve.access import read_keys
from talkoot.serve.app import MAX_BODY
from talkoot.serve.engine import Piece
from talkoot.serve.model import ServedModel
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.lookup import Neighbours

ASKED: dict[str, Any] = {"model": "village", "prompt": "In the sauna", "max_tokens": 5}
ENDLESS = ASKED | {"max_tokens": 10**6, "stream": True}
MOST = {"max_tokens": 10**6}


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return small_model()


@pytest.fixture(scope="module")
def address(loop: LoopThread, model: ServedModel) -> Iterator[str]:
    with served(loop, model, **MOST) as address:
        yield address


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=LIMIT_S, trust_env=False) as client:
        yield client


def refused(answer: httpx.Response, status: int, code: str | None = None) -> str:
    """Checks that this is an error object. Returns its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    return str(error["message"])


def metric(http: httpx.Client, address: str, name: str, **labels: str) -> float:
    text = http.get(f"{address}metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_names_what_the_model_read_for_it(loop: LoopThread, http: httpx.Client) -> None:
    spec = RetrievalSpec(chunk=4, neighbours=1, length=8)

    def find(chunks: Sequence[Sequence[int]]) -> list[Neighbours]:
        passages = [Passage("steam", bytes(chunk).decode(), "sauna.txt", 0, "CC0-1.0") for chunk in chunks]
        return [Neighbours(spec.nothing(), (passage,)) for passage in passages]

    reading = replace(small_model(retrieval=spec), find=find)
    expected = [
        {"title": title, "source": "sauna.txt", "license": "CC0-1.0"} for title in ("In t", "he s", "auna")
    ]
    with served(loop, reading, **MOST) as address:
        for stream in (False, True):
            asked = ASKED | {"max_tokens": 2, "stream": stream}
            text = http.post(f"{address}v1/completions", json=asked).text
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line and "DONE" not in line]
            answers = [json.loads(line) for line in lines] if stream else [json.loads(text)]
            (said,) = [answer["talkoot"] for answer in answers if "talkoot" in answer]
            assert said == {"sources": expected}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_streams(address: str) -> None:
    command = [
        "curl", "--silent", "--show-error", "--no-buffer", "--max-time", "90", f"{address}v1/completions",
        "--header", "Content-Type: application/json", "--data", json.dumps(ASKED | {"stream": True}),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    events = ended.stdout.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "village", "prompt": NaN}',
        b'{"model": "village", "prompt": "a", "temperature": 1e999}',
        b'{"model": "village", "prompt": "\\ud800"}',
        b'{"model": "village", "prompt": ' + b"[" * 100_000,
        b'{"model": "village", "prompt": "a", "max_tokens": true}',
        b'{"model": "village", "prompt": "a", "max_tokens": 1.5}',
        b'{"model": "village", "prompt": "a", "seed": 99999999999999999999999}',
        b'{"prompt": "a"}',
    ],
    ids=lambda body: body[:60].decode(errors="replace"),
)
def test_what_is_no_request_is_refused(http: httpx.Client, address: str, body: bytes) -> None:
    for path in ("v1/completions", "v1/chat/completions"):
        answer = http.post(address + path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert len(answer.text) < 1000


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": ["a", "b"]}, "prompt: List should have at most 1 item after validation, not 2"),
        ({"prompt": [[1], [2]]}, "prompt: List should have at most 1 item after validation, not 2"),
        ({"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
        ({"prompt": [1, "a"]}, "prompt: Input should be a valid integer"),
        ({"prompt": [1, -1]}, "prompt: Input should be greater than or equal to 0"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"stop": list("abcde")}, "stop: List should have at most 4 items after validation, not 5"),
    ],
)
def test_a_refusal_is_about_the_alternative_that_was_meant(
    http: httpx.Client, address: str, wrong: dict[str, Any], said: str
) -> None:
    assert refused(http.post(f"{address}v1/completions", json=ASKED | wrong), 400, "invalid_value") == said


@pytest.mark.parametrize(
    "messages",
    [
        [], "hello", [{}], [{"role": "tool", "content": "x"}], [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)  # fmt: skip
def test_messages_that_are_none_are_refused(http: httpx.Client, address: str, messages: object) -> None:
    answer = http.post(f"{address}v1/chat/completions", json={"model": "village", "messages": messages})
    assert "messages" in refused(answer, 400, "invalid_value")


def test_parts_of_a_message_are_one_text(http: httpx.Client, address: str) -> None:
    def tokens(content: object) -> int:
        asked = {"model": "village", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        answer = http.post(f"{address}v1/chat/completions", json=asked)
        count = answer.json()["usage"]["prompt_tokens"]
        assert isinstance(count, int)
        return count

    assert tokens([{"type": "text", "text": "Mo"}, {"type": "text", "text": "i!"}]) == tokens("Moi!")


@pytest.mark.parametrize("size", [MAX_BODY + 1, 20 * MAX_BODY])
@pytest.mark.parametrize("says_so", [True, False])
def test_a_huge_body_is_refused(http: httpx.Client, address: str, size: int, says_so: bool) -> None:
    def parts() -> Iterator[bytes]:
        for start in range(0, size, 2**16):
            yield b"x" * min(2**16, size - start)

    headers = {"content-type": "application/json"} | ({"content-length": str(size)} if says_so else {})
    answer = http.post(f"{address}v1/completions", content=parts(), headers=headers)
    assert "at most 1 MiB" in refused(answer, 413, "request_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_any_web_page_could_send_is_refused(http: httpx.Client, address: str, kind: str) -> None:
    answer = http.post(f"{address}v1/completions", content=json.dumps(ASKED), headers={"content-type": kind})
    assert "Content-Type: application/json" in refused(answer, 415)
    assert "access-control-allow-origin" not in answer.headers


def test_other_hosts_paths_and_methods_are_refused(http: httpx.Client, address: str) -> None:
    refused(http.get(f"{address}v1/models", headers={"host": "evil.example"}), 421)
    assert "Not Found" in refused(http.get(f"{address}v1/embeddings"), 404)
    answer = http.get(f"{address}v1/completions")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["", "healthz", "metrics", "status", "v1/models", "nothing", "static/page.js"]
)
def test_every_answer_keeps_a_browser_safe(http: httpx.Client, address: str, path: str) -> None:
    headers = http.get(address + path).headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_a_stream_has_no_line_ends_but_its_own(
    loop: LoopThread, model: ServedModel, http: httpx.Client
) -> None:
    """httpx, for example, treats U+2028 and U+0085 as line ends."""
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = ["\u2028".encode(), "\x85".encode()] * 128
    with (
        served(loop, replace(model, tokenizer=tokenizer)) as address,
        http.stream("POST", f"{address}v1/completions", json=ASKED | {"stream": True}) as answer,
    ):
        *events, last = filter(None, answer.iter_lines())
    assert last == "data: [DONE]"
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert len("".join(texts)) == ASKED["max_tokens"]


@pytest.mark.parametrize(("streams", "written_by"), [(False, "whole"), (True, "chunks")])
def test_an_answer_is_written_on_another_thread(
    loop: LoopThread,
    http: httpx.Client,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    streams: bool,
    written_by: str,
) -> None:
    """With 20 log probabilities for each of 4,096 tokens, it takes most of a second, at once or as the chunk that has
    accumulated for a client that reads slowly.
    """
    write = getattr(api.CompletionReply, written_by)
    threads: list[threading.Thread] = []

    def noted(reply: api.CompletionReply, piece: Piece) -> Any:
        if piece.scored:
            threads.append(threading.current_thread())
        return write(reply, piece)

    async def current_thread() -> threading.Thread:
        return threading.current_thread()

    monkeypatch.setattr(api.CompletionReply, written_by, noted)
    asked = ASKED | {"logprobs": 20, "stream": streams}
    assert http.post(f"{address}v1/completions", json=asked).status_code == 200
    assert threads
    assert loop.run(current_thread(), LIMIT_S) not in threads


@pytest.mark.parametrize(
    ("streams", "at_once", "later"),
    [
        (True, b"", b""),
        (False, b"", b""),
        (False, b"", b"\r\n"),
        (False, b"GET / HTTP/1.1\r\nX-A: " + b"b" * 2**14, b""),
    ],
)
def test_a_client_that_hangs_up_ends_its_answer(
    http: httpx.Client, address: str, streams: bool, at_once: bytes, later: bytes
) -> None:
    """`at_once`, `later`: what the client sends behind its request."""
    left = metric(http, address, "talkoot_serve_requests_total", outcome="left")
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    body = json.dumps(ENDLESS | {"stream": streams})
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            + at_once
        )
        until(lambda: metric(http, address, "talkoot_serve_streams") == 1)
        client.sendall(later)
    until(lambda: metric(http, address, "talkoot_serve_streams") == 0)
    until(lambda: metric(http, address, "talkoot_serve_requests_total", outcome="left") == left + 1)


def test_a_request_beyond_the_bounds_is_told_to_come_again(
    loop: LoopThread, model: ServedModel, http: httpx.Client
) -> None:
    bounds = {"max_streams": 2, "max_waiting": 1, "max_per_client": 64, **MOST}
    with served(loop, model, **bounds) as address, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(http.stream("POST", f"{address}v1/completions", json=ENDLESS))
        answer = http.post(f"{address}v1/completions", json=ASKED)
        assert "busy" in refused(answer, 429, "rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) > 0
        until(lambda: metric(http, address, "talkoot_serve_waiting") == 1)
        assert metric(http, address, "talkoot_serve_streams") == 2
        stack.close()
        until(lambda: http.post(f"{address}v1/completions", json=ASKED).status_code == 200)


def test_one_client_can_not_take_all_places(
    loop: LoopThread, model: ServedModel, http: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sauna-key\n\nlake-key\n")
    sauna, lake = ({"authorization": f"Bearer {name}-key"} for name in ("sauna", "lake"))
    bounds = {"max_per_client": 1, "api_key_file": tmp_path / "keys", **MOST}
    with served(loop, model, **bounds) as address:
        url = f"{address}v1/completions"
        with http.stream("POST", url, json=ENDLESS, headers=sauna):
            answer = http.post(url, json=ASKED, headers=sauna)
            assert "you have 1 request under way" in refused(answer, 429, "rate_limit_exceeded")
            assert http.post(url, json=ASKED, headers=lake).status_code == 200
        until(lambda: http.post(url, json=ASKED, headers=sauna).status_code == 200)


def test_a_few_clients_that_take_all_places_keep_no_other_out(
    loop: LoopThread, model: ServedModel, http: httpx.Client, tmp_path: Path
) -> None:
    names = ["greedy", "aino", "onni", "helmi"]
    (tmp_path / "keys").write_text("\n".join(f"{name}-key" for name in names))
    keys = [{"authorization": f"Bearer {name}-key"} for name in names]
    bounds = {"max_streams": 1, "max_waiting": 1, "api_key_file": tmp_path / "keys", **MOST}
    with served(loop, model, **bounds) as address, contextlib.ExitStack() as stack:
        url = f"{address}v1/completions"
        for _ in range(2):
            stack.enter_context(http.stream("POST", url, json=ENDLESS, headers=keys[0]))
        refused(http.post(url, json=ASKED, headers=keys[0]), 429, "rate_limit_exceeded")
        assert http.post(url, json=ASKED, headers=keys[1]).status_code == 200

        def begin(key: dict[str, str]) -> bool:
            return stack.enter_context(http.stream("POST", url, json=ENDLESS, headers=key)).is_success

        # a client has its answer a moment before its place is free again
        until(lambda: begin(keys[1]))
        assert begin(keys[2])
        refused(http.post(url, json=ASKED, headers=keys[3]), 429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-key"},
        {"authorization": "Basic sauna-key"},
        {"authorization": "Bearer"},
        [("authorization", "Bearer sauna-key"), ("authorization", "Bearer sauna-key")],
    ],
)
def test_a_missing_or_wrong_key_is_refused(
    loop: LoopThread, model: ServedModel, http: httpx.Client, tmp_path: Path, headers: Any
) -> None:
    (tmp_path / "keys").write_text("sauna-key\n")
    with served(loop, model, api_key_file=tmp_path / "keys") as address:
        for answer in (
            http.get(f"{address}v1/models", headers=headers),
            http.get(f"{address}v1/models/village", headers=headers),
            http.post(f"{address}v1/completions", json=ASKED, headers=headers),
            http.post(f"{address}v1/chat/completions", json=ASKED, headers=headers),
        ):
            assert "key" in refused(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get(f"{address}status").json()["needs_key"] is True
        assert http.get(f"{address}healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("text", ["", "\n\n", "two words\n", "sauna-ä\n", None])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str | None) -> None:
    """Otherwise a mistake in the file would open the server to everybody."""
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(DataError, match="keys"):
        read_keys(tmp_path / "keys")


def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sauna-1\r\nsauna-2\r\n", encoding="utf-8-sig")
    keys = read_keys(tmp_path / "keys")
    assert keys.client({"headers": [(b"authorization", b"Bearer sauna-1")]}) == "key 0"


def test_without_experts_it_says_so(loop: LoopThread, model: ServedModel, http: httpx.Client) -> None:
    with served(loop, without_experts(model)) as address:
        assert http.get(f"{address}healthz").status_code == 503
        answer = http.post(f"{address}v1/completions", json=ASKED)
        assert "no expert" in refused(answer, 503)
        assert int(answer.headers["retry-after"]) > 0


def test_status_tells_what_the_page_shows(http: httpx.Client, address: str, model: ServedModel) -> None:
    assert http.get(f"{address}status").json() == {
        "model": "village", "from": "folder", "context": model.model.context, "max_tokens": 10**6,
        "experts": {"live": 8, "total": 8}, "needs_key": False, "answers_questions": False,
    }  # fmt: skip


def test_a_model_of_a_prefix_needs_so_many_tokens(loop: LoopThread, http: httpx.Client) -> None:
    with served(loop, small_model(prefix=4)) as address:
        answer = http.post(f"{address}v1/completions", json=ASKED | {"prompt": "abc"})
        assert "needs 4 or more" in refused(answer, 400, "invalid_value")
        assert http.post(f"{address}v1/completions", json=ASKED).status_code == 200


def test_the_name_of_the_model_can_be_chosen(
    loop: LoopThread, model: ServedModel, http: httpx.Client
) -> None:
    with served(loop, model, model_name="org/sauna") as address:
        assert http.get(f"{address}v1/models/org/sauna").json()["id"] == "org/sauna"
        answer = http.post(f"{address}v1/completions", json=ASKED | {"model": "org/sauna"})
        assert answer.json()["model"] == "org/sauna"
