"""The gradient of a parameter is whole once the last of its uses has been left."""

import pytest

from dpo_cache.lm.layerwise.passes import BOTTOM
from dpo_cache.lm.layerwise.whole import parameters_when_whole
from tests.lm.layerwise.policies import layers_of, policy_of


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_parameters_of_layers_are_whole_when_their_layer_is_left() -> None:
    policy = policy_of("gemma2")  # tied
    names = {id(parameter): name for name, parameter in policy.model.named_parameters()}
    whole = parameters_when_whole(policy.model, layers_of(policy))
    assert sorted(whole) == [BOTTOM, 0, 1]
    for index in (0, 1):
        assert whole[index] and all(f"layers.{index}." in names[id(one)] for one in whole[index])
    assert {names[id(one)] for one in whole[BOTTOM]} == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_what_layers_share_is_whole_at_its_first_use_and_frozen_ones_never() -> None:
    policy = policy_of("llama")
    first, last = policy.model.model.layers
    last.mlp = first.mlp
    last.self_attn.requires_grad_(False)
    policy.model.model.norm.weight = last.input_layernorm.weight  # used by the top as well
    whole = {
        index: {id(one) for one in parameters}
        for index, parameters in parameters_when_whole(policy.model, layers_of(policy)).items()
    }
    assert {id(one) for one in first.mlp.parameters()} <= whole[0]
    assert whole[1] == {id(last.post_attention_layernorm.weight)}
    assert id(policy.model.model.norm.weight) in whole[BOTTOM]
    assert not {id(one) for one in last.self_attn.parameters()} & set().union(*whole.values())
