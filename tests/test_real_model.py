"""The same promises on a small real model: `make test-slow`."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo_cache
from tests.conftest import naive_token_logps

pytestmark = pytest.mark.real_model
ROOT = Path(dpo_cache.__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> str:
    folder = os.environ.get("DPO_CACHE_REAL_MODEL", "")
    assert folder, "run `make test-slow`, which fetches the model and says where it is"
    return folder


@pytest.mark.parametrize("attention", ["forest", "rows"])
def test_log_probs_equal_a_full_log_softmax(model: str, attention: str, tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    dpo_cache.precompute(
        model, str(ROOT / "examples/data/heldout.jsonl"), str(tmp_path), limit=12, attention=attention
    )
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for entry in dpo_cache.open_cache(tmp_path).pairs("heldout"):
        for completion, score in (
            (entry.pair.chosen, entry.ref_chosen),
            (entry.pair.rejected, entry.ref_rejected),
        ):
            naive = float(naive_token_logps(plain, completion).sum())
            assert abs(score.logps - naive) <= 1e-6 * abs(naive) + 1e-4
            assert np.isfinite(score.token_logps).all()
