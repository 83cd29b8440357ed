"""Objects from imports are exempt from garbage collection."""

import gc
from collections.abc import Iterator

import pytest

from talkoot.options import imports_without_gc


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_no_collection_runs_meanwhile_and_none_looks_at_it_later() -> None:
    with imports_without_gc():
        assert not gc.isenabled()
        imported: list[object] = []
        imported.append(imported)
    assert gc.isenabled()
    assert not any(imported is tracked for tracked in gc.get_objects())


def test_collections_go_on_when_an_import_fails() -> None:
    with pytest.raises(ModuleNotFoundError), imports_without_gc():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
