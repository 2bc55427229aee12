"""Code that only a CUDA device runs: kernels, copies on streams, and pinned host memory.

The tests are skipped, with the reason, where torch finds no CUDA device.
"""

import numpy as np
import pytest
import torch

from dpo_cache.lm.budget import Budget
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.forest.kernels import KERNELS
from dpo_cache.lm.memory import offload
from dpo_cache.lm.memory.offload import CudaTransfer, offload_activations
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.lm.families import make_model

pytestmark = pytest.mark.gpu
COMPLETIONS = make_completions()


def cuda_scores(model, attention: AttentionChoice, tokens: int) -> list[np.ndarray]:
    budget = Budget(tokens, torch.device("cuda"), lambda _: None)
    found = dict(
        entry
        for progress in score_completions(model, COMPLETIONS, attention, budget)
        for entry in progress.scores
    )
    return [found[index].token_logps for index in range(len(COMPLETIONS))]


def gradients(model, completions: list[Completion], attention: AttentionChoice) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    logps = completion_logps(model, completions, attention).sums()
    (logps * torch.linspace(0.5, 1.5, len(logps), device=logps.device)).sum().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_forest_and_rows_score_alike_and_as_exactly_as_plain_code(family: str) -> None:
    found = {}
    for name in ("rows", "forest"):
        model = make_model(family).cuda()
        found[name] = cuda_scores(model, choose_attention(model, name, max_length=64), 4096)
    naive_model, exact_model = make_model(family).cuda(), make_model(family).double()
    for index, completion in enumerate(COMPLETIONS):
        exact = naive_token_logps(exact_model, completion)
        naive = naive_token_logps(naive_model, completion, torch.float32).cpu().double()
        for name, scores in found.items():
            error = (torch.from_numpy(scores[index]).double() - exact).abs()
            assert (error <= (naive - exact).abs() + 3e-5).all(), name


@pytest.mark.parametrize("tokens", [7, 50])
def test_scores_that_leave_the_gpu_one_chunk_late_are_those_of_one_chunk(tokens: int) -> None:
    """A chunk's values are copied to pinned memory during the next chunk's computation."""
    model = make_llama().cuda()
    attention = choose_attention(model, max_length=64)
    whole = cuda_scores(model, attention, 100_000)
    for one, other in zip(cuda_scores(model, attention, tokens), whole, strict=True):
        assert np.abs(one - other).max() < 1e-5


def test_gradients_are_those_of_the_cpu() -> None:
    model = make_llama()
    expected = gradients(model, COMPLETIONS, choose_attention(model, max_length=64))
    on_gpu = make_llama().cuda()
    found = gradients(on_gpu, COMPLETIONS, choose_attention(on_gpu, max_length=64))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-6, name


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        *((family, kernel) for family in ("llama", "mistral", "llama4") for kernel in KERNELS["cuda"]),
        ("gemma2", "flex"),
        ("gpt_oss", "flex"),
    ],
)
def test_each_kernel_gives_the_gradient_of_the_cpu(family: str, kernel: str) -> None:
    model = make_model(family)
    expected = gradients(model, COMPLETIONS, choose_attention(model, max_length=64))
    on_gpu = make_model(family).cuda()
    assert use_forest_attention(on_gpu)
    for mode in ("none", "selective"):
        Recomputation(on_gpu).mode = mode
        found = gradients(on_gpu, COMPLETIONS, AttentionChoice("forest", "for the test", kernel=kernel))
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-5, name


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flash_attention_errs_as_much_as_the_segments_in_bf16(family: str) -> None:
    model = make_model(family).cuda()
    assert use_forest_attention(model)
    segments = AttentionChoice("forest", "for the test")
    exact = completion_logps(model, COMPLETIONS, segments).tokens_T.detach()
    gaps = {}
    for kernel in ("segments", "varlen"):
        in_bf16 = make_model(family).cuda().bfloat16()
        assert use_forest_attention(in_bf16)
        choice = AttentionChoice("forest", "for the test", kernel=kernel)
        gaps[kernel] = (completion_logps(in_bf16, COMPLETIONS, choice).tokens_T.detach() - exact).abs().mean()
    assert gaps["varlen"] <= 1.5 * gaps["segments"]


def test_the_host_waits_for_nothing_in_a_forward_pass() -> None:
    model = make_llama().cuda()
    attention = choose_attention(model, max_length=64)
    completion_logps(model, COMPLETIONS, attention)
    torch.cuda.set_sync_debug_mode("error")
    try:
        completion_logps(model, COMPLETIONS, attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_in_pinned_memory_come_back() -> None:
    transfer = CudaTransfer(torch.device("cuda"))
    content = torch.arange(2**20, device="cuda").to(torch.uint8)
    on_host = transfer.to_host(content)
    assert on_host[0].is_pinned()
    assert torch.equal(transfer.wait(transfer.to_device(on_host)), content)


@pytest.mark.parametrize("mode", ["none", "cheap", "full"])
def test_offloaded_activations_change_no_gradient(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 4096)
    model = make_llama().cuda()
    attention = choose_attention(model, max_length=64)
    Recomputation(model).mode = mode
    expected = gradients(model, COMPLETIONS, attention)
    assert offload_activations(model, pytest.fail) == 2
    for _ in range(2):
        found = gradients(model, COMPLETIONS, attention)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
