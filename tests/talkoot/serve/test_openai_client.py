"""The official `openai` client against a server on a real socket."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from openai_client import openai_client
from served_model import CONTEXT, served, small_model

from peer.loop import LoopThread
from talkoot.serve.model import ServedModel

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "In the sauna"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return small_model()


@pytest.fixture(scope="module")
def address(loop: LoopThread, model: ServedModel) -> Iterator[str]:
    with served(loop, model) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator["OpenAI"]:
    with openai_client(address, 90) as client:
        yield client


def test_models(client: "OpenAI") -> None:
    import openai

    assert [each.id for each in client.models.list()] == ["village"]
    assert client.models.retrieve("village").object == "model"
    with pytest.raises(openai.NotFoundError) as failed:
        client.models.retrieve("town")
    assert (failed.value.status_code, failed.value.code) == (404, "model_not_found")


def test_completion(client: "OpenAI") -> None:
    answer = client.completions.create(model="village", prompt=PROMPT, max_tokens=9, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (9, len(PROMPT) + 9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert answer.model == "village"


def test_stream_is_the_same_text(client: "OpenAI") -> None:
    request: dict[str, Any] = {
        "model": "village",
        "prompt": PROMPT,
        "max_tokens": 40,
        "seed": 3,
        "temperature": 0.9,
    }
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_seed_decides_the_text(client: "OpenAI") -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(model="village", prompt=PROMPT, max_tokens=30, seed=seed)
        return answer.choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_tokens_as_prompt(client: "OpenAI") -> None:
    texts = {
        client.completions.create(model="village", prompt=prompt, temperature=0).choices[0].text
        for prompt in (PROMPT, [PROMPT], list(PROMPT.encode()), [list(PROMPT.encode())])
    }
    assert len(texts) == 1


def test_stop_sequence_is_left_out(client: "OpenAI") -> None:
    request: dict[str, Any] = {"model": "village", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    stop = text[10:14]
    answer = client.completions.create(**request, stop=["never in it", stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**request, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat(client: "OpenAI") -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Moi!"}]
    request: dict[str, Any] = {
        "model": "village",
        "messages": messages,
        "temperature": 0,
        "max_completion_tokens": 20,
    }
    whole = client.chat.completions.create(**request)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("Be kind.\n\nUser: Moi!\nAssistant:")
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_logprobs_of_a_completion(client: "OpenAI") -> None:
    answer = client.completions.create(
        model="village", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3
    ).choices[0]
    scored = answer.logprobs
    assert scored is not None
    assert scored.tokens is not None
    assert scored.token_logprobs is not None
    assert scored.top_logprobs is not None
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == 12
    for token, logprob, top in zip(scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())


def test_logprobs_of_a_chat_in_a_stream(client: "OpenAI") -> None:
    request: dict[str, Any] = {
        "model": "village",
        "messages": [{"role": "user", "content": "Moi!"}],
        "max_tokens": 12,
    }
    stream = client.chat.completions.create(**request, seed=1, logprobs=True, top_logprobs=2, stream=True)
    scored = [
        token for chunk in stream if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert len(scored) == 12
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in scored)
    assert all(bytes(each.bytes).decode(errors="replace") for each in scored)


@pytest.mark.parametrize(
    ("request_", "status", "code", "said"),
    [
        ({"model": "town"}, 404, "model_not_found", "there is 'village'"),
        ({"prompt": "x" * (CONTEXT + 1)}, 400, "context_length_exceeded", "context is 64"),
        ({"prompt": "x" * 100_000}, 400, "context_length_exceeded", "context is 64"),
        ({"prompt": ""}, 400, "invalid_value", "0 tokens"),
        ({"prompt": ["a", "b"]}, 400, "invalid_value", "prompt"),
        ({"prompt": [256]}, 400, "invalid_value", "from 0 to 255"),
        ({"max_tokens": 10**6}, 400, "invalid_value", "at most 4096"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"n": 2}, 400, "invalid_value", "one answer to a request"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "invalid_value", "stop"),
        ({"stop": ""}, 400, "invalid_value", "stop"),
        ({"presence_penalty": 1.5}, 400, "invalid_value", "does not support"),
        ({"echo": True}, 400, "invalid_value", "does not support"),
        ({"extra_body": {"colour": "red"}}, 400, "invalid_value", "no such parameter"),
    ],
)
def test_bad_requests_are_refused(
    client: "OpenAI", request_: dict[str, object], status: int, code: str, said: str
) -> None:
    import openai

    with pytest.raises(openai.APIStatusError, match=said) as failed:
        client.completions.create(**{"model": "village", "prompt": PROMPT, **request_})  # type: ignore[call-overload]  # bad on purpose
    assert (failed.value.status_code, failed.value.code) == (status, code)
