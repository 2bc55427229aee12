"""How many operators a layer starts on a GPU, and that the host never waits for the device within a step's forward."""

from __future__ import annotations

import contextlib
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import DataDependentOutputException

from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.kernels.lora_linear import use_fast_lora
from dpo_cache.lm.memory.recompute import MODES, Recomputation
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from tests.fake_cuda.fakes import Operators, fake_cuda, make_pairs, needs_cuda_build

pytestmark = needs_cuda_build

SHAPES = {
    "long": (4, 512, 256),
    "short": (16, 100, 60),
    "shortest": (64, 30, 20),
}  # pairs, tokens of prompt and answer
LLAMA_1B = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
GEMMA2_2B = {
    "vocab_size": 32000, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "sliding_window": 4096,
}  # fmt: skip
MOST_OPERATORS = 50


def forward(
    shape: str,
    num_layers: int,
    kernel: str,
    precision: str = "bf16",
    mode: str = "none",
    kind: str = "llama",
    lora: bool = False,
) -> Operators:
    """The operators of the forward pass of a step that trains on these pairs in one forest."""
    make = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_1B, num_hidden_layers=num_layers)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA2_2B, num_hidden_layers=num_layers)),
    }[kind]
    dtype = torch.get_default_dtype()
    with fake_cuda():
        try:
            torch.set_default_dtype(torch.bfloat16 if precision == "bf16" or lora else torch.float32)
            with torch.device("cuda"):
                model = make().eval()
                if lora:
                    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
                    add_lora(model)
        finally:
            torch.set_default_dtype(dtype)
        assert use_forest_attention(model)
        Recomputation(model).mode = mode
        choice = AttentionChoice(
            "forest", "for the test", kernel=kernel, has_plain_head=not lora and kind == "llama"
        )
        policy = PolicyModel(model, choice, precision=precision)
        completions = make_pairs(*SHAPES[shape], vocab_size=32000)
        with Operators() as operators:
            (logps,) = policy([completions])
            assert logps.sums().device.type == "cuda"
    return operators


def add_lora(model: Any) -> None:
    """Adapters on all linear layers, in torch's default dtype; parameters without values cannot be moved."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
        get_peft_model(model, LoraConfig(r=16, target_modules=targets), autocast_adapter_dtype=False)
    assert use_fast_lora(model) == 7 * model.config.num_hidden_layers


@functools.cache
def per_layer(*arguments: Any) -> int:
    shape, *others = arguments
    return forward(shape, 2, *others).launches - forward(shape, 1, *others).launches


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_layer_takes_at_most_50_operators_whatever_the_number_of_segments(
    kernel: str, precision: str
) -> None:
    counts = {per_layer(shape, kernel, precision) for shape in SHAPES}
    assert len(counts) == 1 and max(counts) <= MOST_OPERATORS


def test_by_segments_it_takes_several_for_each_segment() -> None:
    counts = [per_layer(shape, "segments") for shape in SHAPES]
    assert counts == sorted(counts) and counts[0] > MOST_OPERATORS and counts[-1] > 10 * MOST_OPERATORS


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["varlen", "flex", "segments"])
def test_the_host_never_waits_in_a_forward_pass(kernel: str, mode: str, precision: str) -> None:
    operators = forward("short", 2, kernel, precision, mode)
    assert operators.waits == []
    names = {"varlen": "aten._flash_attention_forward.default", "flex": "dpo_cache.flex_attention.default"}
    if kernel == "varlen" and precision == "fp32":
        assert operators.counts["aten._efficient_attention_forward.default"] == 2
    elif kernel in names:
        assert operators.counts[names[kernel]] == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # within PEFT
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_lora_adds_its_products(precision: str) -> None:
    """Two products for each of 7 layers; the update is added by the second."""
    assert forward("short", 2, "varlen", precision, lora=True).waits == []
    assert per_layer("shortest", "varlen", precision, "none", "llama", True) == per_layer(
        "long", "varlen", precision, "none", "llama", True
    )


def test_gemma2_with_its_soft_cap_takes_one_call_a_layer() -> None:
    operators = forward("short", 2, "flex", kind="gemma2")
    assert operators.counts["dpo_cache.flex_attention.default"] == 2
    assert operators.waits == []
    assert per_layer("shortest", "flex", "bf16", "none", "gemma2") == per_layer(
        "long", "flex", "bf16", "none", "gemma2"
    )


def test_waits_are_seen() -> None:
    with fake_cuda():
        values = torch.zeros(3, device="cuda")
        for wait in (
            lambda: values.cpu(),
            lambda: torch.zeros(3).to("cuda"),
            lambda: torch.zeros(3).copy_(values),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: values[values > 0],
            lambda: values.sum().item(),
        ):
            with Operators() as operators, contextlib.suppress(RuntimeError, DataDependentOutputException):
                wait()
            assert len(operators.waits) == 1
        pinned = torch.empty(3, pin_memory=True)
        with Operators() as operators:
            pinned.to("cuda", non_blocking=True)
            pinned.copy_(values, non_blocking=True)
        assert operators.waits == []
