"""Imports that last as long as the process: torch and hivemind make a quarter of a million objects."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """No garbage collection looks through what is imported inside, neither meanwhile nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
