"""OpenAI's client of a server. Its import takes seconds, so only the process that uses it pays for it: each process of
tests imports all files of tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI


@contextmanager
def openai_client(address: str, limit_s: float) -> Iterator["OpenAI"]:
    """`address`: the server's, with a slash at the end."""
    from openai import OpenAI

    with OpenAI(base_url=f"{address}v1", api_key="unused", max_retries=0, timeout=limit_s) as client:
        yield client
