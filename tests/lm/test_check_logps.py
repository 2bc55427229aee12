"""What is expected of each way, and the reasons that are given where it differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.check_logps import (
    TOLERANCES,
    check_causality,
    compare,
    depends_on_length,
    expect,
    other_end,
    rows_problems,
)
from dpo_cache.lm.check_rows import short_rows
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.families.tiny import make_tiny


def test_what_is_expected_is_the_log_probs_of_the_models_own_forward() -> None:
    model, completions = make_llama(), make_completions()
    for completion, found in zip(completions, expect(model, completions), strict=True):
        assert (found - naive_token_logps(model, completion)).abs().max() < 1e-5


def test_a_gap_beyond_rounding_or_nan_is_a_problem() -> None:
    model, values = make_llama(), torch.zeros(10)
    assert compare([values + 5e-5], [values], model) == ("", pytest.approx(5e-5))
    for wrong in (values + 2e-4, values + 2e-3 * (torch.arange(10) == 3), values + torch.nan):
        assert compare([wrong], [values], model)[0].startswith("it differs from plain rows by up to")


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.007), (torch.float16, 0.001)])
def test_gaps_of_all_tokens_together_are_a_problem_where_no_token_has_one(
    dtype: torch.dtype, noise: float
) -> None:
    model, generator = make_llama().to(dtype), torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator) - 5
    rounding = noise * torch.randn(2000, generator=generator)
    assert compare([values + rounding], [values], model)[0] == ""
    for wrong in (values + 8 * rounding, values + rounding + 2 * noise):
        problem, largest = compare([wrong], [values], model)
        assert problem.startswith("it differs from plain rows by ") and "nats" in problem
        assert largest < TOLERANCES[dtype][0] and (wrong - values).abs().mean() < TOLERANCES[dtype][1]
    assert compare([values[:9] + 3 * rounding[:9]], [values[:9]], model)[0] == "", "too few to know"


def test_only_content_after_a_token_makes_a_model_not_causal() -> None:
    model = make_tiny("deepseek_v32")  # at a top-k of 8, ties make log-probs depend on the row's length
    rows = short_rows(264, 64)
    expected = expect(model, rows)
    changed = other_end(rows[0])
    assert changed is not None and len(changed) == len(rows[0])
    check_causality(model, rows[0], expected[0], *expect(model, [changed]))
    assert depends_on_length(model, rows, expected)
    model = make_llama()
    assert not depends_on_length(model, rows, expect(model, rows))


def test_rows_of_one_answer_token_have_nothing_to_compare() -> None:
    assert other_end(Completion(np.arange(3, dtype=np.uint32), np.arange(1, dtype=np.uint32))) is None


def test_code_that_fails_on_padded_rows_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_llama(), short_rows(264, 64)
    expected = expect(model, rows)
    assert [*rows_problems(model, rows, expected, [[0, 1], [2]])] == ["", ""]

    def fails(**_: object) -> None:
        raise ValueError("no masks here")

    monkeypatch.setattr(model.model, "forward", fails)
    assert [*rows_problems(model, rows, expected, [[0]])] == [
        "it cannot be run as a decoder and a head (no masks here)"
    ]


def test_memory_that_ends_is_no_problem_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_llama(), short_rows(264, 64)
    expected = expect(model, rows)

    def runs_out(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model.model, "forward", runs_out)
    for run in (lambda: [*rows_problems(model, rows, expected, [[0]])], lambda: expect(model, rows)):
        with pytest.raises(torch.OutOfMemoryError):
            run()


def test_log_probs_that_are_not_finite_are_refused() -> None:
    model = make_llama()
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinite"):
        expect(model, short_rows(264, 64))
