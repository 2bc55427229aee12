"""Pair sets of several parts though they are small."""

import pytest

import dpo_cache.store.pairs as pairs_module


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "PART_PAIRS", 2)
