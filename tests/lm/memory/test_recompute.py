"""Recomputation changes no gradient, and the gradients are those of the model's own forward."""

import numpy as np
import pytest
import torch

from dpo_cache.lm.forest import segments
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.memory import recompute
from dpo_cache.lm.memory.recompute import MODES, Recomputation, activation_bytes
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama
from tests.lm.families import make_model

COMPLETIONS = make_completions()
WEIGHTS = torch.linspace(0.5, 1.5, len(COMPLETIONS), dtype=torch.float64)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (logps.double() * WEIGHTS).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def own_logp(model: torch.nn.Module, completion: Completion) -> torch.Tensor:
    ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(completion.prompt_ids) - 1 :].double().sum()


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    "family",
    ["mistral", "gemma2", "qwen3_moe", "deepseek_v3", "llama4", "gpt2", "granite", "bloom", "qwen3_next"],
)
def test_every_mode_gives_the_gradients_of_the_models_own_forward(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "QUERY_TOKENS", 3)  # segments in parts, across windows
    model = make_model(family)
    own = gradients(model, torch.stack([own_logp(model, completion) for completion in COMPLETIONS]))
    chosen = choose_attention(model, max_length=64)
    recomputation = Recomputation(model)
    assert recomputation.num_layers
    found = {}
    for recomputation.mode in ("none", "selective", "full"):
        found[recomputation.mode] = gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
    none, selective, full = found["none"], found["selective"], found["full"]
    for name, expected in own.items():
        assert (none[name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-4, name
        assert torch.equal(selective[name], none[name]) and torch.equal(full[name], none[name]), name
    assert none.keys() == own.keys()


@pytest.mark.rotating(3)
@pytest.mark.parametrize(("num_layers", "num_trims"), [(2, 2), (17, 8)])
@pytest.mark.parametrize("mode", MODES)
def test_free_memory_is_returned_eight_times_in_a_forward_pass_with_gradients(
    num_layers: int, num_trims: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[torch.device] = []
    monkeypatch.setattr(recompute, "release_free_bytes", trimmed.append)
    model = make_llama(num_hidden_layers=num_layers)
    chosen = AttentionChoice("forest", "") if use_forest_attention(model) else pytest.fail("no forest")
    Recomputation(model).mode = mode
    logps = completion_logps(model, COMPLETIONS, chosen)
    assert trimmed == [torch.device("cpu")] * num_trims
    logps.sums().sum().backward()
    with torch.no_grad():
        completion_logps(model, COMPLETIONS, chosen)
    assert len(trimmed) == num_trims


def test_products_of_low_rank_are_computed_again() -> None:
    recomputation = Recomputation(make_model("mistral"))
    product = torch.ops.aten.mm.default
    attention_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert recomputation._is_kept(product, (torch.empty(5, 65), torch.empty(65, 7)))
    assert not recomputation._is_kept(product, (torch.empty(5, 64), torch.empty(64, 7)))
    assert recomputation._is_kept(attention_kernel, (torch.empty(1, 2, 5, 64),))


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "mixtral", "gpt_oss"])
def test_activation_bytes_count_layers_that_are_not_linear(family: str) -> None:
    """At least the outputs of attention and of the chosen experts, or of the feed-forward layer."""
    model = make_model(family)
    config = model.config.get_text_config()
    hidden = config.hidden_size
    assert activation_bytes(model, 10, "none") >= 4 * 10 * 2.7 * config.num_hidden_layers * 4 * hidden
