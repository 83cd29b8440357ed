"""Who may use the server, and how much each client may ask at once."""

import contextlib
import hashlib
import hmac
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from starlette.types import Scope

from peer.bounded import counting
from peer.errors import DataError
from peer.formatting import counted
from talkoot.serve.api import RequestError
from talkoot.web import near

RETRY_S = 5
"""How many seconds later a refused client may try again."""
_LONGEST_FILE = 2**20


class ApiKeys:
    """The keys, one of which a client must send; empty: anybody may use the server."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def are_needed(self) -> bool:
        return bool(self._digests)

    def client(self, scope: Scope) -> str:
        """The client of a request: its key, or else its line. Raises RequestError if the key is missing
        or wrong.
        """
        if not self._digests:
            return near(scope.get("client"))
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        # compares all of them, so that the time reveals nothing
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
            raise RequestError(401, message, "invalid_api_key")
        return f"key {matches.index(True)}"


class Places:
    """Limits the requests in progress, for each client and in all.

    If a few clients have taken all places, others still get one each, up to as many again.
    """

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def taken(self, client: str) -> Iterator[None]:
        """Raises RequestError if no place is free."""
        if self._taken.total() >= (self._most if self._taken[client] else 2 * self._most):
            raise RequestError(
                429, "the server is busy; try again later", "rate_limit_exceeded", retry_after_s=RETRY_S
            )
        if self._taken[client] >= self._most_per_client:
            raise RequestError(
                429,
                f"you have {counted(self._most_per_client, 'request')} under way; wait until one is answered",
                "rate_limit_exceeded",
                retry_after_s=RETRY_S,
            )
        with counting(self._taken, client):
            yield


def read_keys(path: Path | None) -> ApiKeys:
    """Raises DataError."""
    if path is None:
        return ApiKeys([])
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_FILE + 1)
        text = data.removeprefix(BOM_UTF8).decode("ascii")
        keys = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DataError(
            f"can't read {path}: {error.strerror}; pass a file with one key on each line"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a file of API keys: it is not text in ASCII") from error
    if not keys or len(data) > _LONGEST_FILE or any(" " in key for key in keys):
        raise DataError(f"{path} is not a file of API keys: put one key without spaces on each line")
    return ApiKeys(keys)
