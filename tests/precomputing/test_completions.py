"""Completions of token ids are scored as rows of a data set are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.precomputing.completions import score_completions
from dpo_cache.precomputing.units import Unit
from dpo_cache.store import completion_key, open_cache
from tests.conftest import make_completions, make_llama, make_tokenizer, naive_token_logps


def unit_of(num_prompts: int = 3) -> Unit:
    found = {completion_key(one): one for one in make_completions(num_prompts=num_prompts)}
    completions = [*found.values()]
    rows = [[place] for place in range(len(found))]
    return Unit([*found], completions, rows, count_forest_tokens(completions), "rows")


def test_scores_are_those_of_the_model(model_folder: str, tmp_path: Path) -> None:
    cache, unit = open_cache(tmp_path / "cache", create=True), unit_of()
    reference = score_completions(cache, model_folder, unit)
    scores = cache.scores(reference).fetch(unit.keys)
    model = make_llama()
    for score, completion in zip(scores, unit.completions, strict=True):
        np.testing.assert_allclose(score.token_logps, naive_token_logps(model, completion).numpy(), atol=1e-4)
    assert not [name for name in cache.folder.names(f"references/{reference}") if name.startswith(".run")]


def test_another_model_is_not_taken_for_the_reference(model_folder: str, tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    first = score_completions(cache, model_folder, unit_of())
    make_llama(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=f"has scores of {first[:12]}"):
        score_completions(cache, str(tmp_path / "model"), unit_of(), expected=first)
    assert cache.references() == [first]


def test_weights_that_are_not_finite_are_one_error(tmp_path: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="gives log-probs that are NaN"):
        score_completions(open_cache(tmp_path / "cache", create=True), str(tmp_path / "model"), unit_of())
