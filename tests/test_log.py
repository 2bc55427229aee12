"""Phases are reported where somebody listens, the inner one first."""

from __future__ import annotations

import pytest

from dpo_cache.log import phase, phases_reported


def test_phases_are_reported_with_the_outer_one_again_afterwards() -> None:
    found: list[str | None] = []

    @phase("inner")
    def work() -> int:
        return 3

    with phases_reported(found.append), phase("outer"):
        assert work() == 3
    assert found == ["outer", "inner", "outer", None]
    work()
    assert len(found) == 4


def test_a_phase_ends_with_an_error() -> None:
    found: list[str | None] = []
    with phases_reported(found.append), pytest.raises(ValueError, match="x"), phase("a"):
        raise ValueError("x")
    assert found == ["a", None]
