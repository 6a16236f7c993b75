"""The collector stays out of imports, and comes back whatever they do."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from shoal.protocol.imports import importing


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_what_imports_made_is_never_collected_again() -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() - before >= len(made)


def test_an_import_that_fails_brings_the_collector_back() -> None:
    with pytest.raises(ImportError), importing():
        import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_who_had_no_collector_has_none_afterwards() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
