"""A server of a model that answers questions from a memory."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from openai_client import openai_client
from served_model import answering, served
from shelf import COLOURS, HOST, QUESTIONS, SHELF, TOKENIZER, Shelf, learned, passage

from dht.memory import MemoryID
from peer.loop import LoopThread
from talkoot.serve.engine import Answering, Job, Stream
from talkoot.train.ask import Answered, QuestionAnswerer
from trainer_client.memory.retriever import Hit, SearchResult
from trainer_client.retrieval.answering import Answer, RagModel, Source
from trainer_client.settings import Sampling

if TYPE_CHECKING:
    from openai import OpenAI

LIMIT_S = 300.0


@pytest.fixture(scope="module")
def model() -> RagModel:
    return learned("rag-sequence", 60)[0]


@pytest.fixture(scope="module")
def client(loop: LoopThread, model: RagModel) -> Iterator["OpenAI"]:
    with (
        served(loop, answering(model, SHELF)) as address,
        openai_client(address, LIMIT_S) as client,
    ):
        yield client


def chat(client: "OpenAI", *messages: tuple[str, str], **more: Any) -> Any:
    said: Any = [{"role": role, "content": content} for role, content in messages]
    return client.chat.completions.create(model="sauna", messages=said, **more)


def test_a_chats_last_message_is_answered_with_its_sources(client: "OpenAI") -> None:
    question = QUESTIONS[0]
    answer = chat(client, ("system", "Be kind."), ("user", question.text), temperature=0.3, max_tokens=50)
    assert answer.choices[0].message.content == question.answer == "red"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model_extra["talkoot"]["sources"][0] == {
        "title": "kiuas", "source": "sauna.txt", "license": "CC0-1.0",
    }  # fmt: skip
    assert answer.usage.prompt_tokens == len(question.text)
    assert answer.usage.completion_tokens == len("red")


def test_an_answer_comes_as_a_stream_and_as_a_completion_too(client: "OpenAI") -> None:
    question = QUESTIONS[1]
    *_, last = chunks = list(chat(client, ("user", question.text), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == question.answer
    assert last.model_extra["talkoot"]["sources"][0]["title"] == "vihta"
    completed = client.completions.create(model="sauna", prompt=question.text)
    assert completed.choices[0].text == question.answer


def test_many_questions_at_once_are_each_answered_as_if_alone(client: "OpenAI") -> None:
    with ThreadPoolExecutor(10) as threads:
        asked = [*QUESTIONS, *QUESTIONS]
        answers = threads.map(lambda question: chat(client, ("user", question.text)), asked)
    assert [each.choices[0].message.content for each in answers] == [question.answer for question in asked]


class HeldUp(Shelf):
    """A model whose answers to one question wait until they are let go."""

    def __init__(self, question: str) -> None:
        super().__init__([passage(name, colour) for name, colour in COLOURS.items()])
        self.question, self.asked, self.let_go = question, threading.Semaphore(0), threading.Event()

    def search(self, texts: Sequence[str], *arguments: Any, **more: Any) -> list[SearchResult]:
        if texts == [self.question]:
            self.asked.release()
            self.let_go.wait(LIMIT_S)
        return super().search(texts, *arguments, **more)


def test_a_question_whose_hosts_are_slow_holds_no_other_up(loop: LoopThread, model: RagModel) -> None:
    slow, *others = QUESTIONS
    shelf = HeldUp(slow.text)
    with (
        served(loop, answering(model, shelf)) as address,
        openai_client(address, LIMIT_S) as client,
        ThreadPoolExecutor(Answering.AT_ONCE - 1) as threads,
    ):
        held_up = [threads.submit(chat, client, ("user", slow.text)) for _ in range(Answering.AT_ONCE - 1)]
        try:
            for _ in held_up:
                assert shelf.asked.acquire(timeout=LIMIT_S)
            for question in others:
                answer = chat(client, ("user", question.text))
                assert answer.choices[0].message.content == question.answer
            assert not any(each.done() for each in held_up)
        finally:
            shelf.let_go.set()
        assert [each.result().choices[0].message.content for each in held_up] == ["red"] * len(held_up)


def test_a_question_whose_client_hung_up_takes_its_thread_for_one_more_token_at_most(model: RagModel) -> None:
    question, computed = QUESTIONS[0].text, list[str]()
    stream = Stream(Job((), Sampling(), question=question), "somebody", TOKENIZER.token_bytes)

    def hang_up() -> bool:
        computed.append(question)
        stream.cancelled = True
        return True

    answers = Answering(QuestionAnswerer(model, SHELF, "sequence", hang_up), TOKENIZER)
    answers.compute([stream])
    answers._threads.shutdown(wait=True)
    assert len(computed) == 1


def test_nothing_found_is_said_as_such_and_has_no_sources(client: "OpenAI") -> None:
    answer = chat(client, ("user", "miksi?"))
    assert answer.choices[0].message.content == (
        f"Nothing found: memory {SHELF.id} knows no word of this question; ask in the words and the language of its "
        "passages."
    )
    assert not (answer.model_extra or {}).get("talkoot", {}).get("sources")


def test_passages_that_do_not_say_it_are_no_sources() -> None:
    memory = MemoryID.of("shelf", HOST)
    hit = Hit(passage("kiuas", "red"), 1.0, 1.0, memory, b"", HOST, SHELF.encode(["kiuas"])[0])
    silent = Answered(memory, SearchResult((hit,)), [Answer("", 0.9, (Source(hit, 1.0),))])
    assert silent.text == f"Nothing found: memory {memory} does not say it in the 1 passage that fit best."
    assert silent.sources == ()
    assert Answered(memory, SearchResult(()), ()).text == (
        f"Nothing found: memory {memory} has no passages near this question."
    )
    sure = Answered(
        memory, SearchResult((hit,)), [Answer("red", 0.9, (Source(hit, 0.99), Source(hit, 0.01)))]
    )
    assert (sure.text, sure.sources) == ("red", (hit.passage,))


@pytest.mark.parametrize(
    ("question", "more", "said"),
    [
        (" ", {}, "messages: ask something"),
        ("what? " * 2000, {}, "shorten it to 10000"),
        (f"what is {'and ' * 20}?", {}, "tokens, but this swarm's models see only 64: shorten the question"),
        ("what?", {"logprobs": True}, "logprobs: an answer has none"),
        ("what?", {"max_tokens": 10**9}, "max_tokens: at most"),
    ],
)
def test_what_can_not_be_answered_is_refused(
    client: "OpenAI", question: str, more: dict[str, Any], said: str
) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=said):
        chat(client, ("user", question), **more)


def test_only_a_users_text_is_a_question(client: "OpenAI") -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="the last one must be the user's question"):
        chat(client, ("user", "what?"), ("assistant", "That."))
    with pytest.raises(openai.BadRequestError, match="send one as text"):
        client.completions.create(model="sauna", prompt=[1, 2, 3])


def test_a_memory_whose_hosts_are_away_is_an_error_until_they_are_back(
    loop: LoopThread, model: RagModel
) -> None:
    import openai

    shelf = Shelf([passage("kiuas", "red"), passage("vihta", "green")])
    with (
        served(loop, answering(model, shelf)) as address,
        openai_client(address, LIMIT_S) as client,
    ):
        shelf.is_there = False
        with pytest.raises(openai.InternalServerError, match="nobody is there") as failed:
            chat(client, ("user", QUESTIONS[0].text))
        assert failed.value.status_code == 503
        shelf.is_there = True
        assert chat(client, ("user", QUESTIONS[0].text)).choices[0].message.content == "red"
