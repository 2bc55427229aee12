"""Pair sets of several parts though they are small, and runs in processes of their own."""

from collections.abc import Iterator

import pytest

import dpo_cache.store.pairs as pairs_module
from tests.promises.forking import Runs


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "PART_PAIRS", 2)


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """Started with the first test that needs it."""
    process = Runs()
    yield process
    process.close()
