"""Mixtures of experts are counted in every precision, by torch's allocator within a tenth."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_cache.planning import footprint
from tests.families.tiny import make_tiny
from tests.planning.test_footprint import allocated, pairs


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_float32_experts_are_counted_as_they_are_allocated(family: str) -> None:
    sizes = {"hidden_size": 64, "max_position_embeddings": 512}
    model, run = make_tiny(family, **sizes).eval(), footprint.pass_loss(pairs(4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = footprint.policy_of(footprint.build_fake(model.config, torch.float32), "cheap")
        counted = footprint.activation_bytes(fake, run)
    assert counted == pytest.approx(allocated(footprint.policy_of(model, "cheap"), run), rel=0.1)


def test_experts_with_values_are_multiplied_as_before() -> None:
    from transformers.integrations import moe

    model = make_tiny("mixtral").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        footprint.use_counted_experts()
        assert torch.equal(model(ids).logits, expected)
    inputs, weights = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    assert moe._can_use_grouped_mm(inputs, weights, torch.tensor([2, 4], dtype=torch.int32))
