"""Code that only a CUDA device runs, as far as it runs without values; the backward functions of this package's
own operators are called directly, for the backward engine asks for a driver.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dpo_cache.lm.forest import flex_call, varlen
from dpo_cache.lm.forest.attention import Rules, use_forest_attention
from dpo_cache.lm.forest.flex import FlexPlan
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.segments import Segment, segments_of
from dpo_cache.lm.forest.stream import Stream
from dpo_cache.lm.forest.varlen import Sequences, lay_out
from dpo_cache.lm.kernels import head, lora_linear
from dpo_cache.lm.memory.offload import offload_activations
from dpo_cache.lm.memory.recompute import MODES, Recomputation
from dpo_cache.lm.memory.recompute_later import recompute_later, recording
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.scoring import ChunkRunner
from dpo_cache.lm.self_check import AttentionChoice
from tests.conftest import make_completions
from tests.fake_cuda.fakes import Operators, fake_cuda, make_pairs, needs_cuda_build
from tests.lm.families import FAMILIES

pytestmark = needs_cuda_build
CUDA = torch.device("cuda")
NAMES = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt2", "phi3", "gpt_oss", "llama4", "mixtral"]
KERNELS = ["varlen", "flex", "segments"]
ONE_CALL = {"varlen": "aten._flash_attention_forward.default", "flex": "dpo_cache.flex_attention.default"}
NOT_FUSED = ("gemma2", "gpt_oss")  # soft caps and sinks, which sequences do not take


def make_on_cuda(family: str) -> Any:
    """In bf16: the product of experts takes no float32 tensors without values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = FAMILIES[family]().eval()
    finally:
        torch.set_default_dtype(before)
    assert use_forest_attention(model)
    return model


def pairs_of(family: str) -> list[tuple[str, str]]:
    return [(family, kernel) for kernel in KERNELS if not (kernel == "varlen" and family in NOT_FUSED)]


ALL = [pair for family in NAMES for pair in pairs_of(family)]


@pytest.mark.parametrize(("family", "kernel"), ALL)
def test_chunks_are_scored_without_waiting(family: str, kernel: str) -> None:
    num_chunks = 0
    with fake_cuda(), torch.no_grad():
        runner = ChunkRunner(make_on_cuda(family), Stream(make_completions()), kernel)
        with Operators() as operators:
            for chunk in runner.stream.chunks(lambda: 40):
                logps_T = runner.run(chunk)
                assert logps_T.device.type == "cuda" and len(logps_T) == len(chunk.targets_T)
                num_chunks += 1
    assert operators.waits == [] and num_chunks > 3
    if kernel in ONE_CALL:
        assert operators.counts[ONE_CALL[kernel]] == 2 * num_chunks  # layers


@pytest.mark.parametrize(("family", "kernel"), ALL)
def test_training_runs_forward_without_waiting(family: str, kernel: str) -> None:
    with fake_cuda():
        policy = PolicyModel(
            make_on_cuda(family), AttentionChoice("forest", "", kernel=kernel), with_squares=True
        )
        with Operators() as operators:
            (logps,) = policy([make_completions()])
            assert logps.sums().requires_grad and logps.excess_means().device.type == "cuda"
    assert operators.waits == []


def test_routing_is_measured_without_waiting() -> None:
    with fake_cuda():
        policy = PolicyModel(
            make_on_cuda("mixtral"), AttentionChoice("forest", "", kernel="varlen"), with_routing=True
        )
        with Operators() as operators:
            (logps,) = policy([make_completions()])
            assert logps.routing is not None and logps.routing.probs_E.requires_grad
    assert operators.waits == []


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_activations_leave_for_the_host_without_waiting(kernel: str, mode: str) -> None:
    with fake_cuda(), mock.patch("dpo_cache.lm.memory.offload.MIN_BYTES", 64):
        model = make_on_cuda("llama")
        Recomputation(model).mode = mode
        assert offload_activations(model, pytest.fail) == 2
        with Operators() as operators:
            PolicyModel(model, AttentionChoice("forest", "", kernel=kernel))([make_completions()])
    assert operators.waits == []


@pytest.mark.parametrize(
    "rules", [Rules(0.125), Rules(0.125, softcap=50.0), Rules(0.125, 50), Rules(0.125, chunk=64)]
)
@pytest.mark.parametrize("has_path", [False, True])
def test_compiled_flex_attention_gets_as_far_as_the_driver(rules: Rules, has_path: bool) -> None:
    """A soft cap that is a symbol to the compiler fails earlier, without these words."""
    torch._dynamo.reset()
    with fake_cuda():
        plan = FlexPlan(segments_of(build_forest(make_pairs(4, 60, 40))), CUDA)
        if has_path:
            plan = FlexPlan([Segment(0, 300, 200), Segment(300, 560, 100)], CUDA, {}, 600)
        assert plan.path_length == 256 * has_path
        query = torch.zeros(1, 4, 560, 64, device="cuda")
        key, value = (torch.zeros(1, 2, 560 + plan.path_length, 64, device="cuda") for _ in range(2))
        with pytest.raises(Exception, match="Found no NVIDIA driver"):
            plan._call(rules).compute(query, key, value, None)


# -- backward functions -------------------------------------------------------------------------------------


def context(*saved: Any, needed: tuple[bool, ...], **others: Any) -> SimpleNamespace:
    return SimpleNamespace(saved_tensors=saved, needs_input_grad=needed, **others)


class Context(SimpleNamespace):
    """Of a forward function that is called directly."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_heads_backward(is_frozen: bool) -> None:
    with fake_cuda(), torch.device("cuda"):
        hidden, weight = torch.zeros(50, 32, dtype=torch.bfloat16), torch.zeros(3000, 32)
        targets, ctx = torch.zeros(50, dtype=torch.int64), Context(needs_input_grad=(True, not is_frozen))
        with Operators() as operators:
            logps_T = head._HeadLogps.forward(ctx, hidden, weight, targets, head.TORCH)
            grads = head._HeadLogps.backward(ctx, torch.ones_like(logps_T))
        assert [grad is None or (grad.shape, grad.dtype) for grad in grads] == [
            (hidden.shape, hidden.dtype), is_frozen or (weight.shape, weight.dtype), True, True,
        ]  # fmt: skip
    assert operators.waits == []


def test_the_backward_of_logps_from_logits() -> None:
    with fake_cuda(), torch.device("cuda"):
        logits, targets = torch.zeros(5, 30, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.int64)
        ctx = Context(needs_input_grad=(True,))
        logps_T = head._TargetLogps.forward(ctx, logits, targets)
        (grad, _) = head._TargetLogps.backward(ctx, torch.ones_like(logps_T))
        assert (grad.shape, grad.dtype, grad.device.type) == (logits.shape, logits.dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_lora(dtype: torch.dtype) -> None:
    with fake_cuda(), torch.device("cuda"):
        output, inputs = torch.zeros(2, 7, 24, dtype=dtype), torch.zeros(2, 7, 16, dtype=dtype)
        down, up = torch.zeros(4, 16), torch.zeros(24, 4)
        ctx = Context(needs_input_grad=(True,) * 4)
        sums_NO = lora_linear._AddUpdate.forward(ctx, output, inputs, down, up, 2.0, dtype)
        grads = lora_linear._AddUpdate.backward(ctx, torch.zeros_like(sums_NO))
        for grad, tensor in zip(grads, (output, inputs, down, up), strict=False):
            assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)


def test_the_backward_of_gathered_keys_is_one_sum() -> None:
    with fake_cuda():
        forest = build_forest(make_completions())
        sequences = Sequences(lay_out(segments_of(forest), Rules(1.0)), len(forest), CUDA)
        keys = torch.zeros(len(forest), 2, 8, device="cuda", dtype=torch.bfloat16)
        ctx = Context()
        gathered = varlen._Gather.forward(
            ctx, keys, sequences._keys_P, sequences._uses_P, sequences._first_uses
        )
        given = torch.zeros_like(gathered)
        with Operators() as operators:
            grad, *_ = varlen._Gather.backward(ctx, given)
        assert (grad.shape, grad.dtype, grad.device) == (keys.shape, keys.dtype, keys.device)
    assert operators.counts == {"aten._embedding_bag_forward_only.default": 1}
    assert operators.waits == []


def test_recomputed_tensors_are_views_of_what_their_call_gives() -> None:
    with fake_cuda(), torch.device("cuda"):
        values = torch.zeros(4, 6, requires_grad=True)
        packed = []
        with (
            recording(),
            torch.autograd.graph.saved_tensors_hooks(lambda one: packed.append(one) or one, lambda one: one),
        ):
            output = recompute_later(lambda tensor: tensor * 2, values)
            (output.t() @ torch.zeros(4, 3)).sum()
        call = output.grad_fn.call
        again = call.view((4, 6), (6, 1), 0)
        assert (again.shape, again.device.type) == ((4, 6), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backward_of_sequences(dtype: torch.dtype) -> None:
    """torch's own: for each sequence, gradients of the queries and of the gathered keys and values."""
    with fake_cuda(), torch.device("cuda"):
        forest = build_forest(make_completions())
        sequences = Sequences(lay_out(segments_of(forest), Rules(1.0, window=9)), len(forest), CUDA)
        query = torch.zeros(len(forest), 4, 8, dtype=dtype, requires_grad=True)
        keys, values = (torch.zeros(len(sequences.layout.keys_P), 2, 8, dtype=dtype) for _ in range(2))
        output = sequences.attend(query, keys, values, Rules(1.0, window=9))
        assert (output.shape, output.dtype) == (query.shape, dtype)
        name = {torch.bfloat16: "FlashAttentionBackward", torch.float32: "EfficientAttentionBackward"}[dtype]
        functions, seen = [output.grad_fn], []
        while functions:
            function = functions.pop()
            seen.append(function.name())
            functions += [following for following, _ in function.next_functions if following is not None]
        assert any(name in one for one in seen)


def test_gradients_of_flex_attention_are_asked_of_the_compiled_kernel() -> None:
    torch._dynamo.reset()
    with fake_cuda():
        plan = FlexPlan(segments_of(build_forest(make_pairs(2, 60, 40))), CUDA)
        call = plan._call(Rules(0.125))
        tensors = [torch.zeros(1, heads, 280, 64, device="cuda") for heads in (4, 2, 2)]
        grad = torch.zeros(1, 4, 280, 64, device="cuda")
        with pytest.raises(Exception, match="driver|device_index"):
            flex_call.attention_gradients(call, grad, [*tensors, None], (True, True, True, False))


def test_arrays_come_from_pinned_memory() -> None:
    from dpo_cache.lm.device import to_device

    with fake_cuda(), Operators() as operators:
        assert to_device(np.arange(3), CUDA).device.type == "cuda"
    assert operators.waits == []
