"""Objects from imports are exempt from garbage collection."""

import gc
import signal
from collections.abc import Iterator

import pytest

from peer.platform.signals import stop_signals
from talkoot.signals import StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    yield StopSignals()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.unfreeze()


def test_no_collection_runs_meanwhile_and_none_looks_at_it_later(signals: StopSignals) -> None:
    with signals.importing():
        assert not gc.isenabled()
        imported: list[object] = []
        imported.append(imported)
    assert gc.isenabled()
    assert not any(imported is tracked for tracked in gc.get_objects())


def test_collections_go_on_when_an_import_fails(signals: StopSignals) -> None:
    with pytest.raises(ModuleNotFoundError), signals.importing():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
