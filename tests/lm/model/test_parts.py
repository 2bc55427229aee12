"""A model's head is its own forward from hidden states on."""

import pytest
import torch

from dpo_cache.lm.model.parts import decoder_of, has_plain_head, head_of
from tests.families.tiny import make_tiny
from tests.lm.families import FAMILIES, make_model


@pytest.mark.rotating(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_and_head_are_the_models_own_forward(family: str) -> None:
    model, ids = make_model(family), torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0][0]
        assert torch.equal(head_of(model)(hidden), model(input_ids=ids, use_cache=False).logits[0])


def test_a_head_may_read_a_factor_of_its_decoder() -> None:
    """As Falcon H1's does: `logits = lm_head(hidden) * self.model.lm_head_multiplier`."""
    model, ids = make_tiny("falcon_h1", lm_head_multiplier=0.5), torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0][0]
        assert torch.equal(head_of(model)(hidden), model(input_ids=ids, use_cache=False).logits[0])
    assert not has_plain_head(model)
    assert has_plain_head(make_tiny("falcon_h1", lm_head_multiplier=1.0))


def test_a_head_that_reads_more_than_the_last_hidden_states_is_an_error() -> None:
    """ProphetNet's logits come from its n-gram stream."""
    with pytest.raises(IndexError, match="reads more than the last hidden states"):
        head_of(make_tiny("prophetnet"))(torch.randn(3, 32))
