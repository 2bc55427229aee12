"""A guess of a model's speed on a device that was not measured, from the weights in its files."""

import pytest

from dpo_cache.precomputing.nominal_speed import OPERATIONS_PER_S, nominal_tokens_per_s
from tests.conftest import make_llama


@pytest.mark.parametrize(("device", "cores", "factor"), [("cuda", 1, 1), ("cpu", 1, 1), ("cpu", 4, 4)])
def test_two_operations_for_each_weight(model_folder: str, device: str, cores: float, factor: int) -> None:
    num_weights = sum(one.numel() for one in make_llama().parameters())
    found = nominal_tokens_per_s(model_folder, None, device, cores)
    assert found == pytest.approx(factor * OPERATIONS_PER_S[device] / (2 * num_weights))
