"""The router loss of mixtures of experts, layer by layer, equals the plain one; its gradients, too."""

import sys

import pytest
import torch

from dpo_cache.lm.layerwise.record import NotLayerMajorError
from dpo_cache.lm.layerwise.routing import CapturedRouters
from tests.lm.layerwise.policies import loss_of, policy_of, run_of, two_pieces
from tests.lm.layerwise.test_passes import largest_gap, take_gradients

# plain, experts that all tokens share, dense layers before, a router in attention as well, one model in another
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "jetmoe", "qwen3_5_moe")


@pytest.mark.rotating(2)
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_routing_equals_the_plain_run(family: str) -> None:
    policy, pieces = policy_of(family, with_routing=True), two_pieces()
    plain = policy(pieces)
    torch.stack([loss_of(logps) for logps in plain]).sum().backward()
    expected = take_gradients(policy.model)
    run = run_of(policy, CapturedRouters(policy.model))
    for _ in range(2):  # a second step starts anew
        run.forward(pieces)
        for place, one in enumerate(plain):
            logps = run.logps(place)
            assert logps.routing.num_rows == one.routing.num_rows
            assert torch.equal(logps.routing.choices_E, one.routing.choices_E)
            torch.testing.assert_close(logps.routing.probs_E, one.routing.probs_E, rtol=1e-6, atol=0)
            loss_of(logps).backward()
            run.end_top(place)
        run.backward(lambda _: None)
        found = take_gradients(policy.model)
        assert any("gate" in name or "router" in name for name in found)
        assert largest_gap(found, expected) < 1e-6


def test_layers_whose_logits_no_hook_sees_are_refused() -> None:
    policy = policy_of("llama", with_routing=True)
    policy.model.config.num_experts_per_tok = 2
    run = run_of(policy, CapturedRouters(policy.model))
    run.forward(two_pieces())
    with pytest.raises(NotLayerMajorError, match="see no router logits in its layers"):
        run.logps(0)


def test_a_transformers_without_hooks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
    with pytest.raises(NotLayerMajorError, match="no hooks that collect router logits"):
        CapturedRouters(policy_of("llama").model)
