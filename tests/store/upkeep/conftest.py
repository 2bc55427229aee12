"""A cache of eight small shards, and what the tests of compact, gc and remove read from it."""

from pathlib import Path

import pytest

from dpo_cache.store import Cache
from tests.store.caches import key_of, make_cache

SHARDS = [range(start, start + 5) for start in range(0, 40, 5)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "cache", shards=SHARDS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def reference_of(cache: Cache) -> str:
    return cache.references()[0]


def values(cache: Cache, numbers: object) -> list[list[float]]:
    return [
        score.token_logps.tolist()
        for score in cache.scores(reference_of(cache)).fetch([key_of(number) for number in numbers])
    ]  # type: ignore[attr-defined]
