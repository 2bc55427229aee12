"""Tiny policies, and the pieces of a step, for tests of layer-major runs."""

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.layerwise.passes import RouterProbe
from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import Layers, find_layers
from dpo_cache.lm.layerwise.states import DeviceStates
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.policy import CompletionLogps, PolicyModel, decoder_pass
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import Completion
from tests.families.check import check_pairs
from tests.families.tiny import make_tiny

WITHOUT_FOREST = (
    "bloom",
    "falcon",
    "falcon_h1",
    "glm_moe_dsa",
    "openai-gpt",
    "qwen3_5_moe",
    "zamba2",
    "zaya",
)


def policy_of(
    family: str, *, with_routing: bool = False, model: PreTrainedModel | None = None
) -> PolicyModel:
    """The tiny model of a family as a policy, run as forests where its code takes them."""
    model = model or make_tiny(family).eval()
    is_forest = family not in WITHOUT_FOREST
    assert not is_forest or use_forest_attention(model)
    choice = AttentionChoice("forest" if is_forest else "rows", "for a test")
    return PolicyModel(model, choice, with_routing=with_routing)


def two_pieces() -> list[list[Completion]]:
    completions = check_pairs()
    return [completions[:2], completions[2:]]


def layers_of(policy: PolicyModel) -> Layers:
    with torch.no_grad():
        arguments = decoder_pass(policy.model, two_pieces()[1], policy.attention).arguments
        return find_layers(policy.model, **arguments)


def run_of(policy: PolicyModel, routers: RouterProbe | None = None) -> LayerMajorRun:
    """A layer-major run of the policy whose tensors all stay on its device."""
    return LayerMajorRun(policy, layers_of(policy), ResidentWeights(), DeviceStates(), routers)


def loss_of(logps: CompletionLogps) -> torch.Tensor:
    """A loss of one piece with the term of a router loss, if there is routing."""
    sums = logps.sums()
    loss = (sums * torch.linspace(0.5, -0.4, len(sums), dtype=sums.dtype)).sum()
    if logps.routing is None:
        return loss
    choices_E, probs_E, num_rows = logps.routing
    return loss + 8 * (choices_E / num_rows * probs_E / num_rows).sum()
