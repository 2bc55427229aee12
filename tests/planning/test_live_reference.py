"""DPO with a live reference is counted as `padded_step.py` runs it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_cache.planning.footprint import activation_bytes, build_fake
from dpo_cache.planning.live_reference import live_reference_peak
from dpo_cache.planning.padded_step import padded_loss, prepare
from dpo_cache.planning.parts import Method
from tests.conftest import make_llama
from tests.planning.test_footprint import SIZES, pairs


@pytest.mark.rotating(2)
@pytest.mark.parametrize("answer", [40, 20])
def test_all_layers_with_a_second_model(answer: int) -> None:
    config = make_llama(**{**SIZES, "num_hidden_layers": 5}).config
    alternating = pairs(2, answer=answer)  # chosen, rejected, chosen, rejected
    given = [*alternating[::2], *alternating[1::2]]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, reference = (build_fake(config, torch.float32) for _ in range(2))
        loss = padded_loss(alternating, autocast=False, reference=reference)
        expected = activation_bytes(prepare(model, checkpointing=True), loss)
    assert live_reference_peak(config, Method("fp32"), given, alike=True) == expected


def test_rounded_copies_of_weights_grow_with_the_layers_until_the_backward_pass_begins() -> None:
    """With few layers the highest moment is the head's gradient, with many the end of the forward pass."""
    config = make_llama(**{**SIZES, "num_hidden_layers": 24, "vocab_size": 8000}).config
    found = [
        live_reference_peak(config, Method("bf16-mixed"), pairs(1), alike=alike) for alike in (True, False)
    ]
    assert found[0] == found[1]
