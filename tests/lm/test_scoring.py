import numpy as np
import pytest
import torch
import transformers as hf

from dpo_cache.errors import ModelError
from dpo_cache.lm.engine import Attention, choose_attention, score_completions
from dpo_cache.lm.policy import checkpoint_layers, completion_logps
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama, naive_token_logps

TINY = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip

FORESTS = {
    "llama": lambda: make_llama(),
    "llama-scaled-rope": lambda: make_llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**TINY, sliding_window=9)),
    "qwen2-mixed": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"])
    ),
    "gemma2-softcap": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**TINY, head_dim=8, sliding_window=10, attn_logit_softcapping=5.0, final_logit_softcapping=4.0, query_pre_attn_scalar=8)
    ),
    "phi-head-bias": lambda: hf.PhiForCausalLM(hf.PhiConfig(**TINY)),
    "gpt2-learned-positions": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3)
    ),
    "gpt_oss-sinks": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **TINY, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "cohere2-scaled-logits": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**TINY, sliding_window=8, logit_scale=0.3)),
}

ROWS = {
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=264, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256, initializer_range=0.3)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    ),
}


def build(make) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


def scores(model, completions: list[Completion], attention: Attention, budget: int) -> list[np.ndarray]:
    found = dict(entry for progress in score_completions(model, completions, attention, budget) for entry in progress.scores)
    return [found[index].token_logps for index in range(len(completions))]


def assert_as_exact_as_plain(model, completions: list[Completion], found: list[np.ndarray], own_attention: str) -> None:
    """Errs only as much as the model's own forward in float32 does against float64, plus rounding."""
    model.set_attn_implementation(own_attention)
    plain = [naive_token_logps(model, completion, torch.float32).double() for completion in completions]
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    exact_model = model.double()
    for completion, values, naive in zip(completions, found, plain, strict=True):
        exact = naive_token_logps(exact_model, completion)
        error = (torch.from_numpy(values).double() - exact).abs()
        assert (error <= (naive - exact).abs() + 3e-5).all(), float(error.max())


@pytest.mark.parametrize("family", FORESTS)
@pytest.mark.parametrize("budget", [1, 13, 4096])
def test_the_forest_equals_the_models_own_forward(family: str, budget: int) -> None:
    model, completions = build(FORESTS[family]), make_completions()
    own = model.config._attn_implementation
    attention = choose_attention(model, max_length=64)
    assert attention.name == "forest", attention.reason
    found = scores(model, completions, attention, budget)
    assert_as_exact_as_plain(model, completions, found, own)


@pytest.mark.parametrize("family", ROWS)
def test_a_model_that_takes_no_forest_is_run_as_rows(family: str) -> None:
    model, completions = build(ROWS[family]), make_completions()
    attention = choose_attention(model, max_length=64)
    assert attention.name == "rows" and attention.reason
    for budget in (1, 100):
        found = scores(model, completions, attention, budget)
        for completion, values in zip(completions, found, strict=True):
            assert np.abs(values - naive_token_logps(model, completion).numpy()).max() < 3e-5


def test_a_forest_that_is_asked_for_but_inexact_is_refused() -> None:
    with pytest.raises(ModelError, match="BloomForCausalLM cannot use forest attention"):
        choose_attention(build(ROWS["bloom"]), "forest", max_length=64)


def test_a_window_is_proved_only_where_sequences_reach_it() -> None:
    """Chunked attention is not passed on to the forest; within one chunk it does not matter."""
    fields = {**TINY, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "pad_token_id": 0, "attention_chunk_size": 32}
    config = hf.Llama4TextConfig(**fields, layer_types=["chunked_attention", "full_attention"])
    assert choose_attention(build(lambda: hf.Llama4ForCausalLM(config)), max_length=100).name == "rows"


def test_rotary_embeddings_that_depend_on_the_row_are_run_as_rows() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = make_llama(rope_parameters=scaling)
    assert choose_attention(model, max_length=100).name == "rows"


def test_a_bidirectional_model_is_refused() -> None:
    config = hf.BertConfig(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    with pytest.raises(ModelError, match="is not causal"):
        choose_attention(build(lambda: hf.BertLMHeadModel(config)), max_length=64)


def test_weights_that_are_not_finite_stop_the_scoring() -> None:
    model = make_llama()
    attention = choose_attention(model, max_length=64)
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        scores(model, make_completions(), attention, 64)


def test_progress_counts_every_token_of_the_stream_once() -> None:
    model, completions = make_llama(), make_completions()
    attention = choose_attention(model, max_length=64)
    steps = list(score_completions(model, completions, attention, 10))
    assert sum(step.num_tokens for step in steps) == steps[0].total_tokens == len({
        tuple(completion.sequence_ids[: end + 1]) for completion in completions for end in range(len(completion.sequence_ids))
    })  # fmt: skip
    assert sorted(index for step in steps for index, _ in step.scores) == list(range(len(completions)))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2-softcap", "gpt_oss-sinks"])
def test_training_logps_and_gradients_equal_the_plain_computation(family: str) -> None:
    completions = make_completions(num_prompts=3)
    weights = torch.linspace(-1, 1, len(completions), dtype=torch.float64)
    plain, model = build(FORESTS[family]), build(FORESTS[family])
    expected = []
    for completion in completions:
        ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
        logps = plain(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        expected.append(logps[len(completion.prompt_ids) - 1 :].double().sum())
    (torch.stack(expected) * weights).sum().backward()
    attention = choose_attention(model, max_length=64)
    found = completion_logps(model, completions, attention)
    (found * weights).sum().backward()
    assert attention.name == "forest"
    assert torch.allclose(found, torch.stack(expected), rtol=1e-6, atol=1e-4)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())), name


def test_checkpointed_layers_give_the_same_gradient() -> None:
    completions, grads = make_completions(num_prompts=2), []
    for checkpointed in (False, True):
        model = make_llama()
        attention = choose_attention(model, max_length=64)
        if checkpointed:
            assert checkpoint_layers(model) == 2
        completion_logps(model, completions, attention).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_rows_have_gradients_too() -> None:
    model = build(ROWS["gptj"])
    completions = make_completions(num_prompts=2)
    logps = completion_logps(model, completions, choose_attention(model, max_length=64))
    logps.sum().backward()
    expected = torch.stack([naive_token_logps(model, completion).sum() for completion in completions])
    assert torch.allclose(logps, expected, atol=1e-3)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "wte" in name)
