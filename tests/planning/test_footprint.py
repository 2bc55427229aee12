"""The memory of a step, counted only from a config, compared with torch's allocator when the step is computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_cache.errors import OptionError
from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.kernels.lora_linear import use_fast_lora
from dpo_cache.lm.kernels.onednn_linear import ONEDNN, products_of, use_fast_linear
from dpo_cache.lm.memory.recompute import MODES, Recomputation
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.planning import footprint, padded_step
from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.types import Completion
from tests.conftest import make_llama, naive_token_logps
from tests.families.tiny import make_tiny

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


# A mask comes from numpy, whose memory torch's allocator does not see: at most 0.4 MB here, counted but never
# allocated.


def pairs(num_pairs: int, prompt: int = 60, answer: int = 40) -> list[Completion]:
    generator = np.random.default_rng(1)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, 264, length).astype(np.uint32)

    prompts = [ids(prompt) for _ in range(num_pairs)]
    return [Completion(prompt, ids(answer + 7 * side)) for prompt in prompts for side in range(2)]


def allocated(model: Any, run: Callable[[Any], torch.Tensor]) -> int:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return allocated_peak(lambda: run(model).backward())


@pytest.mark.rotating(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_pairs", "prompt"), [(1, 300), (4, 60)])
def test_counted_from_a_config_is_what_is_allocated(mode: str, num_pairs: int, prompt: int) -> None:
    model, run = make_llama(**SIZES), footprint.pass_loss(pairs(num_pairs, prompt))
    with FakeTensorMode(allow_non_fake_inputs=True):
        counted = footprint.step_footprint(
            footprint.policy_of(footprint.build_fake(model.config, torch.float32), mode), run
        )
    assert counted.activations == pytest.approx(allocated(footprint.policy_of(model, mode), run), rel=0.1)
    size = sum(parameter.numel() for parameter in model.parameters())
    steps = 4 * len(list(model.parameters()))
    assert (counted.weights, counted.gradients, counted.optimizer) == (4 * size, 4 * size, 8 * size + steps)
    assert counted.total == 16 * size + steps + counted.activations


@pytest.mark.rotating(2)
@pytest.mark.parametrize("mode", MODES)
def test_adapters_are_counted_as_they_are_allocated(mode: str) -> None:
    pytest.importorskip("peft")
    model, run = make_llama(**SIZES), footprint.pass_loss(pairs(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = footprint.build_fake(model.config, torch.float32, lora_r=4)
        counted = footprint.step_footprint(footprint.policy_of(fake, mode), run, quantize="4bit")
    footprint._add_adapters(model, 4)
    largest = 4 * 192 * 64  # of a layer's weights, counted as made of its 4 bits while it is used
    assert counted.activations - largest == pytest.approx(
        allocated(footprint.policy_of(model, mode), run), rel=0.1
    )
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(trained)
    assert counted.gradients == 4 * adapters and counted.optimizer == 8 * adapters + 4 * len(trained)
    linear = (
        sum(
            module.weight.numel()
            for module in model.modules()
            if type(module) is torch.nn.Linear and not module.weight.requires_grad
        )
        - 264 * 64
    )
    rest = sum(parameter.numel() for parameter in model.parameters()) - linear
    assert counted.weights == pytest.approx(4 * rest + linear * (0.5 + 1 / 64 + 1 / 4096), abs=2)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_is_counted_without_a_change(mode: str) -> None:
    model, completions = make_llama(**SIZES), pairs(2)
    attention = choose_attention(model, max_length=200)
    Recomputation(model).mode = mode
    use_fast_linear(model, decided="onednn")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    counted = footprint.pass_bytes(model, completions, attention)
    assert all(
        parameter.grad is None and torch.equal(parameter, before[name])
        for name, parameter in model.named_parameters()
    )
    if torch.backends.mkldnn.is_available():
        assert products_of(model.model.layers[0].mlp.up_proj) is ONEDNN
    assert counted == pytest.approx(
        allocated_peak(lambda: completion_logps(model, completions, attention).sums().sum().backward()),
        rel=0.1,
    )
    assert counted > sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.rotating(2)
@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_with_adapters_is_counted(mode: str) -> None:
    pytest.importorskip("peft")
    model, completions = make_llama(**SIZES), pairs(4)
    footprint._add_adapters(model, 4)
    assert use_fast_lora(model)
    attention = choose_attention(model, max_length=200)
    Recomputation(model).mode = mode
    counted = footprint.pass_bytes(model, completions, attention)
    assert counted == pytest.approx(
        allocated_peak(lambda: completion_logps(model, completions, attention).sums().sum().backward()),
        rel=0.1,
    )


def test_a_config_is_enough() -> None:
    config = make_llama(**SIZES).config
    found = {
        mode: footprint.config_footprint(config, pairs(4), recomputation=mode, precision="bf16-mixed")
        for mode in MODES
    }
    assert found["none"].activations > found["selective"].activations > found["full"].activations > 0
    half = footprint.config_footprint(
        config, pairs(4), dtype=torch.bfloat16, precision="bf16", optimizer="adamw-8bit"
    )
    assert (
        half.weights == half.gradients == found["none"].weights / 2
        and half.optimizer < found["none"].optimizer / 3
    )
    assert half.activations < found["none"].activations


@pytest.mark.rotating(3)
@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("answer", [40, 33])
def test_the_step_it_is_compared_with_is_counted_as_it_is_allocated(
    checkpointing: bool,
    whole_logits: bool,
    answer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(padded_step, "TILE_ENTRIES", 100)  # several tiles, the last one smaller
    monkeypatch.setattr(padded_step, "TILE_TOKENS", 50)
    completions = pairs(2, answer=answer)
    completions[1] = Completion(
        completions[0].prompt_ids, completions[1].completion_ids[: answer if answer == 40 else None]
    )
    options = {"autocast": False, "whole_logits": whole_logits}
    reference, model = make_llama(**SIZES), make_llama(1, **SIZES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [footprint.build_fake(model.config, torch.float32) for _ in range(2)]
        run = padded_step.padded_loss(completions, reference=fakes[1], **options)
        counted = footprint.step_footprint(
            padded_step.prepare(fakes[0], checkpointing=checkpointing), run, others=[fakes[1]]
        )
    run = padded_step.padded_loss(completions, reference=reference, **options)
    assert counted.activations == pytest.approx(
        allocated(padded_step.prepare(model, checkpointing=checkpointing), run), rel=0.1
    )
    assert counted.weights == 2 * sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("whole_logits", [False, True])
def test_the_step_it_is_compared_with_has_dpos_gradient(
    whole_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padded_step, "TILE_ENTRIES", 100)
    monkeypatch.setattr(padded_step, "TILE_TOKENS", 50)
    completions, model, reference = pairs(2), make_llama(1), make_llama()
    fixed = torch.stack([naive_token_logps(reference, completion).sum() for completion in completions])
    own = torch.stack([_logp(model, completion) for completion in completions])
    ratios = own - fixed
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = padded_step.padded_loss(
        completions, autocast=False, reference=reference, whole_logits=whole_logits
    )(model)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-6


def _logp(model: torch.nn.Module, completion: Completion) -> torch.Tensor:
    ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
    logps = (
        model(input_ids=ids, use_cache=False)
        .logits[0]
        .double()
        .log_softmax(-1)[:-1]
        .gather(1, ids[0, 1:, None])[:, 0]
    )
    return logps[len(completion.prompt_ids) - 1 :].sum()


def test_an_update_that_needs_more_than_the_activations_is_the_peak() -> None:
    model, pair = make_llama(**SIZES), pairs(1, 1, 1)
    found = {
        rounding: footprint.config_footprint(
            model.config,
            pair,
            dtype=torch.bfloat16,
            precision="bf16",
            recomputation="full",
            rounding=rounding,
        )
        for rounding in ("stochastic", None)
    }
    sizes = [parameter.numel() for parameter in model.parameters()]
    ours, plain = found["stochastic"], found[None]
    # float32 value and noise of the largest tensor while it is rounded
    assert ours.update == 10 * max(sizes) > ours.activations
    assert ours.total == (2 + 2 + 8) * sum(sizes) + 4 * len(sizes) + ours.update
    assert plain.update == 0 < plain.activations
    assert plain.total == (2 + 2 + 4) * sum(sizes) + 4 * len(sizes) + plain.activations


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(
    ("family", "changes", "kernel"),
    [
        ("llama", {}, "varlen"),
        ("llama", {"head_dim": 12}, "segments"),
        ("llama", {"head_dim": 264}, "segments"),
        ("deepseek_v3", {}, "segments"),
        ("gemma2", {}, "segments"),
        ("gpt_oss", {}, "segments"),
    ],
)
def test_16_bits_are_counted_by_a_kernel_that_has_a_backward_pass_without_values(
    family: str, changes: dict[str, Any], kernel: str
) -> None:
    config = make_tiny(family, **changes).config
    with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type("cuda"):
        model = footprint.policy_of(footprint.build_fake(config, torch.bfloat16), "cheap")
        assert footprint.counted_attention(model, "bf16").kernel == kernel
        assert footprint.activation_bytes(model, footprint.pass_loss(pairs(1), precision="bf16")) > 0


def test_unknown_quantization_is_refused() -> None:
    with pytest.raises(OptionError, match=r"quantize '2bit': not known\.\nUse one of 4bit, 8bit\."):
        footprint.weight_bytes(make_llama(), "2bit")


def test_recipes_never_keep_more_than_everything() -> None:
    """An adapter in mixed precision casts up and down again: a recipe must not keep the wide copy because the
    narrow one is missing.
    """
    config = make_llama(**SIZES).config
    for lora_r in (None, 4):
        dtype = torch.float32 if lora_r is None else torch.bfloat16
        options = {"dtype": dtype, "precision": "bf16-mixed", "lora_r": lora_r}
        kept, cheap = (
            footprint.config_footprint(config, pairs(4), recomputation=mode, **options).activations
            for mode in ("none", "cheap")
        )
        assert cheap < 0.95 * kept
