"""Time and memory of scoring that has not started."""

import pytest
import torch

from dpo_cache.lm.budget import SIZES
from dpo_cache.planning import scoring_forecast
from dpo_cache.planning.scoring_forecast import Work, scoring_bytes, scoring_method, scoring_seconds
from dpo_cache.planning.timing import EFFICIENCY
from dpo_cache.planning.ways import CONTEXT_BYTES, PROCESS_BYTES
from tests.conftest import make_completions, make_llama

CONFIG = make_llama().config
METHOD = scoring_method(torch.float32, "none")
WORK = Work(num_tokens=1000, num_targets=400, mean_context=10.0, sample=make_completions(num_prompts=60))


def test_seconds_are_operations_at_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_forecast, "measure_tflops", lambda device: 1e-3)
    linear = sum(
        one.numel() for name, one in make_llama().named_parameters() if "layers" in name and one.ndim > 1
    )
    head = CONFIG.vocab_size * CONFIG.hidden_size
    attention = 4 * CONFIG.hidden_size * CONFIG.num_hidden_layers * 10.0
    operations = 1000 * (2 * linear + attention) + 400 * 2 * head
    expected = operations / (1e9 * EFFICIENCY)
    device = torch.device("cpu")
    assert scoring_seconds(CONFIG, METHOD, WORK, device) == pytest.approx(expected)
    assert scoring_seconds(CONFIG, METHOD, WORK, device, num_workers=2) == pytest.approx(
        expected
    )  # shared cores
    gpus = scoring_seconds(CONFIG, METHOD, WORK, torch.device("cuda"), num_workers=2)
    assert gpus == pytest.approx(expected / 2)


def need(
    device_type: str = "cpu", free: int | None = None, budget: int | None = None, streamed: bool = False
) -> int:
    return scoring_bytes(
        CONFIG, METHOD, WORK, device_type, budget_tokens=budget, is_streamed=streamed, free=free
    )


def test_memory_is_that_of_the_largest_chunks_that_fit() -> None:
    weights = sum(one.nbytes for one in make_llama().parameters())
    most = need()
    assert most == need(budget=SIZES["cpu"][-1]) > weights + PROCESS_BYTES
    least = need(budget=SIZES["cpu"][0])
    assert least < most
    assert need(free=most) == most and need(free=most - 1) == least
    assert need(free=0) == least  # nothing smaller is tried


def test_a_gpu_has_its_context_and_a_process_of_its_own() -> None:
    assert need("cuda", budget=512) > CONTEXT_BYTES
    assert need("cuda", budget=512) < PROCESS_BYTES


def test_streamed_weights_are_not_counted() -> None:
    whole, streamed = need(budget=512), need(budget=512, streamed=True)
    assert streamed != whole
