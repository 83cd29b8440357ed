"""OpenAI's HTTP interface: the requests that clients may send, the answers, and the errors."""

import re
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from talkoot.serve.chat import ChatFormat, Message
from talkoot.serve.engine import Piece, ScoredToken
from trainer_client.settings import Sampling

Json = dict[str, Any]
R = TypeVar("R", bound="Request")

_MOST_STOPS, _LONGEST_STOP = 4, 256
_MOST_ALTERNATIVES = 20
_MOST_MESSAGES = 1024
_MOST_NODES = 64
_MOST_SOURCES = 64
"""The most sources that an answer names, the first that were read."""
_MOST_MISTAKES = 1000
_MOST_NESTED = 4096
"""The most lists and objects in a body. They take fifty times their size in memory, and hold up all threads."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?+[^"\\]*+)*+"?+', re.DOTALL)
"""A string in JSON, or the rest of the body if it never ends."""
_COMPLETION_TOKENS, _CHAT_TOKENS = 16, 256
"""How many tokens to generate if the request does not say."""


class RequestError(Exception):
    """A request that can't be answered, as OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        parameter: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.json = error_json(status, message, code, parameter)


def error_json(status: int, message: str, code: str | None = None, parameter: str | None = None) -> Json:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def invalid(parameter: str, problem: str) -> RequestError:
    """The refusal of a parameter's value."""
    return RequestError(400, f"{parameter}: {problem}", "invalid_value", parameter=parameter)


def _neutral(value: object) -> object:
    if value not in (None, False, 0, "", [], {}, "none", "auto", {"type": "text"}, ["text"]):
        raise ValueError("this server does not support it: leave it out")
    return value


def _single(value: int | None) -> int | None:
    if value not in (None, 1):
        raise ValueError("this server gives one answer to a request: leave it out, or send more requests")
    return value


Unsupported = Annotated[Any, AfterValidator(_neutral)]
"""A parameter that clients may send only with its neutral value."""
One = Annotated[int | None, AfterValidator(_single)]
StopSequence = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class StreamOptions(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: Unsupported = None


class Request(BaseModel):
    """What both kinds of requests have in common. Other parameters are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1, le=2**31)
    """Not one of OpenAI's parameters, but most other servers have it."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopSequence | Annotated[list[StopSequence], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None
    user: str | None = Field(default=None, max_length=1024)

    default_tokens: ClassVar[int]

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises RequestError, which names the wrong parameter."""
        if _nested(body) > _MOST_NESTED and _nested(_STRING.sub(b"", body)) > _MOST_NESTED:
            message = f"the body has more than {_MOST_NESTED} lists and objects"
            raise RequestError(400, message, "invalid_value")
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error) from error

    @property
    def wants_usage(self) -> bool:
        """Whether a stream reports the usage; otherwise it is always reported."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, most: int) -> Sampling:
        """`most`: the most tokens that may be generated. Raises RequestError if the request wants more."""
        wanted = self.wanted_tokens()
        if wanted is not None and wanted > most:
            raise invalid("max_tokens", f"at most {most} on this server")
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed % 2**63,
            max_tokens=wanted or min(most, self.default_tokens),
        )

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def alternatives(self) -> int | None:
        """How many alternatives to name for each token of the answer; None: no log probabilities at all."""
        raise NotImplementedError

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# describing each of several hundred thousand mistakes would hold up all threads for a second
TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
OneText = Annotated[list[str], Field(min_length=1, max_length=1, fail_fast=True)]
OneTokenList = Annotated[list[TokenList], Field(min_length=1, max_length=1, fail_fast=True)]


class CompletionRequest(Request):
    """POST /v1/completions"""

    prompt: str | TokenList | OneText | OneTokenList
    """Text or tokens. A list may contain only one prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_ALTERNATIVES)
    best_of: One = None
    echo: Unsupported = None
    suffix: Unsupported = None

    default_tokens = _COMPLETION_TOKENS

    def text_or_tokens(self) -> str | Sequence[int]:
        first = self.prompt[0] if isinstance(self.prompt, list) else self.prompt
        return self.prompt if isinstance(first, int) else first  # type: ignore[return-value]  # the rest are tokens

    def alternatives(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=_MOST_MESSAGES)]
    name: str | None = Field(default=None, max_length=1024)
    refusal: Unsupported = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MOST_ALTERNATIVES)
    tools: Unsupported = None
    tool_choice: Unsupported = None
    parallel_tool_calls: bool | None = None
    response_format: Unsupported = None
    modalities: Unsupported = None
    store: Unsupported = None
    metadata: Unsupported = None

    default_tokens = _CHAT_TOKENS

    @model_validator(mode="after")
    def _logprobs_are_wanted(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def question(self) -> str:
        """The last message. Earlier ones are not part of the question. Raises RequestError."""
        last = self.messages[-1]
        if last.role != "user":
            raise invalid("messages", "the last one must be the user's question")
        return last.text

    def text(self, chat: ChatFormat) -> str:
        return chat.text([Message(each.role, each.text) for each in self.messages])

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _nested(body: bytes) -> int:
    """How many lists and objects begin in this JSON, if there are no strings in it."""
    return body.count(b"[") + body.count(b"{")


def _refusal(error: ValidationError) -> RequestError:
    if error.error_count() > _MOST_MISTAKES:  # each mistake takes a kilobyte
        return RequestError(400, f"the body is wrong in {error.error_count()} places", "invalid_value")
    # of several alternatives, the one that matched furthest: first those of the right type
    problem = max(
        error.errors(include_url=False, include_input=False),
        key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])),
    )
    if problem["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {problem['ctx']['error']}", "invalid_json")
    parameter = str(problem["loc"][0]) if problem["loc"] else None
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this server knows no such parameter"
    where = f"{parameter[:100]}: " if parameter else ""
    return RequestError(400, where + message, "invalid_value", parameter=parameter and parameter[:100])


class Reply:
    """The JSON of one answer, in one piece or in chunks. Subclasses define the format of their kind of answer."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, prompt_tokens: int, names: "TokenNames", wants_usage: bool) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._prompt_tokens = prompt_tokens
        self._names = names
        self._wants_usage = wants_usage
        self._tokens = 0
        self._nodes: set[str] = set()
        self._sources: dict[tuple[str, str, str], None] = {}

    def whole(self, piece: Piece) -> Json:
        """`piece`: the whole answer."""
        self._count(piece)
        choice = {"index": 0, **self._answer(piece), "logprobs": self._logprobs(piece)}
        choice["finish_reason"] = piece.finish
        answer = {**self._head, "object": self.whole_object, "choices": [choice], "usage": self._usage()}
        return answer | self._extension()

    def first(self) -> list[Json]:
        """The chunks before anything has been generated."""
        return []

    def chunks(self, piece: Piece) -> list[Json]:
        """The chunks for a piece; after the last piece, with the usage."""
        self._count(piece)
        chunks = []
        if piece.text or piece.scored:
            chunks.append(self._chunk(self._part(piece), self._logprobs(piece), None))
        if piece.finish is not None:
            chunks.append(self._chunk(self._no_part(), None, piece.finish) | self._extension())
            if self._wants_usage:
                chunks.append({**self._chunk({}, None, None), "choices": [], "usage": self._usage()})
        return chunks

    def _chunk(self, part: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": 0, **part, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **usage}

    def _count(self, piece: Piece) -> None:
        self._tokens += piece.tokens
        self._nodes |= piece.nodes
        for each in piece.read:
            if len(self._sources) < _MOST_SOURCES:
                self._sources[each.title, each.source, each.license] = None

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }

    def _extension(self) -> Json:
        """Fields that OpenAI's answers do not have: the nodes whose experts answered, and what the model read."""
        said: Json = {}
        if self._nodes:
            said["nodes"] = sorted(self._nodes)[:_MOST_NODES]
        if self._sources:
            keys = ("title", "source", "license")
            said["sources"] = [dict(zip(keys, each, strict=True)) for each in self._sources]
        return {"talkoot": said} if said else {}

    def _answer(self, piece: Piece) -> Json:
        raise NotImplementedError

    def _part(self, piece: Piece) -> Json:
        raise NotImplementedError

    def _no_part(self) -> Json:
        raise NotImplementedError

    def _logprobs(self, piece: Piece) -> Json | None:
        raise NotImplementedError


class CompletionReply(Reply):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _answer(self, piece: Piece) -> Json:
        return {"text": piece.text}

    _part = _answer

    def _no_part(self) -> Json:
        return {"text": ""}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not piece.scored:
            return None
        return {
            "tokens": [self._names.text(each.token) for each in piece.scored],
            "token_logprobs": [each.logprob for each in piece.scored],
            "top_logprobs": [
                {self._names.text(token): logprob for token, logprob in each.alternatives}
                for each in piece.scored
            ],
            "text_offset": [each.offset for each in piece.scored],
        }


class ChatReply(Reply):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self) -> list[Json]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None, None)]

    def _answer(self, piece: Piece) -> Json:
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}

    def _part(self, piece: Piece) -> Json:
        return {"delta": {"content": piece.text}}

    def _no_part(self) -> Json:
        return {"delta": {}}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not piece.scored:
            return None
        return {"content": [self._named(each) for each in piece.scored], "refusal": None}

    def _named(self, scored: ScoredToken) -> Json:
        alternatives = [self._names.named(*each) for each in scored.alternatives]
        return self._names.named(scored.token, scored.logprob) | {"top_logprobs": alternatives}


class TokenNames:
    """The names of tokens in answers."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes

    def text(self, token: int) -> str:
        """The token's text. If its bytes are not whole characters, they are written like `bytes:\\xe2\\x82`, as in
        OpenAI's API.
        """
        value = self._token_bytes[token]
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def named(self, token: int, logprob: float) -> Json:
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self._token_bytes[token])}
