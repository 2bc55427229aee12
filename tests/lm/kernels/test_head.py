import pytest
import torch

from dpo_cache.lm.kernels import head as logprobs
from dpo_cache.lm.kernels.head import _KeptSlices, head_token_logps, log_squared_probs, token_logps
from dpo_cache.lm.kernels.onednn_linear import ONEDNN, TORCH, Products
from dpo_cache.lm.model.parts import has_plain_head, head_of
from tests.conftest import make_llama
from tests.lm.families import FAMILIES, make_model


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 50])
def test_chunks_equal_one_log_softmax(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", {"cpu": 16 * 264})
    model = make_llama()
    hidden, targets = torch.randn(num_tokens, 32), torch.randint(0, 264, (num_tokens,))
    with torch.no_grad():
        found = token_logps(hidden, head_of(model), targets, 264)
        expected = model.lm_head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)


def test_log_probs_of_a_large_vocabulary_err_no_more_than_log_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 49_152, generator=generator) * 4
    targets = torch.randint(0, 49_152, (40,), generator=generator)
    hidden[torch.arange(0, 40, 2), targets[::2]] += 30  # every other token has a probability near 1
    exact = hidden.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    naive = hidden.log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
    error = (token_logps(hidden, torch.clone, targets, 49_152).double() - exact).abs()
    assert (error <= (naive - exact).abs() + 2e-6).all()
    two_units_of_a_sum_near_1 = 2 * torch.finfo(torch.float32).eps
    assert (error[::2] <= 1e-6 * exact[::2].abs() + two_units_of_a_sum_near_1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_log_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(9, 264, generator=generator) * 5, torch.randn(9, generator=generator)
    targets = torch.randint(0, 264, (9,), generator=generator)
    fast, plain = (logits.to(dtype).requires_grad_() for _ in range(2))
    (token_logps(fast, lambda hidden: hidden, targets, 264) * weights).sum().backward()
    (plain.float().log_softmax(-1).gather(1, targets[:, None])[:, 0] * weights).sum().backward()
    assert fast.grad.dtype == dtype
    assert torch.allclose(fast.grad, plain.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", {"cpu": 16 * 264})
    model, rows = make_llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[-2]))
    hidden = torch.randn(70, 32, requires_grad=True)
    token_logps(hidden, head_of(model), torch.zeros(70, dtype=torch.long), 264).sum().backward()
    assert max(rows) == 16
    assert sum(rows) == 2 * 70  # once forward, once in the backward pass


def test_the_head_is_a_view_and_leaves_the_model_as_it_is() -> None:
    model = make_llama()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    head = head_of(model)
    head(torch.randn(3, 32))
    assert torch.equal(model(input_ids=ids).logits, before)
    model.lm_head.weight.data.zero_()
    assert not head(torch.randn(3, 32)).any()


@pytest.mark.parametrize("products", [TORCH, ONEDNN], ids=["torch", "oneDNN"])
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 7), (40, 1024), (33, 5000)])
@pytest.mark.parametrize("num_kept", [0, 2 * 33 * 1024, 2**20])
def test_the_head_by_slices_is_as_exact_as_log_softmax(
    num_tokens: int, vocab_size: int, products, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_SLICE", {"cpu": 33 * 1024})  # up to five slices
    monkeypatch.setattr(logprobs, "LOGITS_KEPT", {"cpu": num_kept})
    if products is ONEDNN and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(logprobs, "products_of", lambda _: products)
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, vocab_size, bias=False)
    layer.weight.data = torch.randn(vocab_size, 24, generator=generator)
    hidden = torch.randn(num_tokens, 24, generator=generator) * 3
    outward = torch.randn(num_tokens, generator=generator)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [
            hidden.to(dtype).clone().requires_grad_(),
            layer.weight.detach().to(dtype).clone().requires_grad_(),
        ]
        logps = (leaves[0] @ leaves[1].t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return [
            logps.detach().double(),
            *(grad.double() for grad in torch.autograd.grad(logps, leaves, outward.to(dtype))),
        ]

    leaf = hidden.clone().requires_grad_()
    logps = head_token_logps(leaf, layer, targets)
    found = [logps.detach(), *torch.autograd.grad(logps, [leaf, layer.weight], outward)]
    for one, naive, exact in zip(found, plain(torch.float32), plain(torch.float64), strict=True):
        assert one.dtype == torch.float32
        assert ((one.double() - exact).abs() <= (naive - exact).abs() + 1e-5).all()


def test_all_heads_whose_backward_pass_has_not_begun_keep_only_so_many_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8 tokens, 5,000 entries, slices of 1,024: three of the first head's five slices are kept."""
    monkeypatch.setattr(logprobs, "LOGITS_PER_SLICE", {"cpu": 8 * 1024})
    monkeypatch.setattr(logprobs, "LOGITS_KEPT", {"cpu": 3 * 8 * 1024})
    before = _KeptSlices.num_alive
    layer, calls = torch.nn.Linear(24, 5000, bias=False), []
    products = Products(
        lambda *operands: calls.append(1) or TORCH.output(*operands), TORCH.for_inputs, TORCH.for_weight
    )
    monkeypatch.setattr(logprobs, "products_of", lambda _: products)
    hidden, targets = torch.randn(8, 24), torch.arange(8) * 600
    heads = [head_token_logps(hidden, layer, targets) for _ in range(2)]
    assert len(calls) == 10 and _KeptSlices.num_alive == before + 3 * 8 * 1024
    grads = []
    for number in range(2):
        grads += torch.autograd.grad(heads[number].sum(), layer.weight)
        assert len(calls) == 10 + 2 + 5 * number
    torch.testing.assert_close(*grads)
    heads.clear()
    assert _KeptSlices.num_alive == before
    with torch.no_grad():
        head_token_logps(hidden, layer, targets)
    head_token_logps(hidden.requires_grad_(), layer.requires_grad_(False), targets)
    assert _KeptSlices.num_alive == before


def unscaled_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    """Hidden states, some with a probability near 1 for their target and some for another token."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 5000, bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(5000, 24, generator=generator))
    targets = torch.randint(0, 5000, (33,), generator=generator)
    hidden = torch.randn(33, 24, generator=generator)
    hidden[::3] += layer.weight[targets[::3]].float()
    hidden[1::3] += layer.weight[(targets[1::3] + 1) % 5000].float()
    return hidden.to(dtype), layer, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_gives_only_the_gradient_of_hidden_states(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_SLICE", {"cpu": 33 * 1024})  # five slices
    hidden, frozen, targets = unscaled_logits(dtype)
    trained = torch.nn.Linear(24, 5000, bias=False, dtype=dtype)
    trained.weight.data = frozen.weight.data.clone()
    outward = torch.linspace(-2, 2, 33)
    found, values = {}, {}
    for layer in (frozen, trained):
        leaf = hidden.clone().requires_grad_()
        values[layer] = head_token_logps(leaf, layer, targets)
        values[layer].backward(outward)
        found[layer] = leaf.grad.double()
    assert frozen.weight.grad is None and torch.allclose(
        values[frozen], values[trained], rtol=1e-6, atol=1e-6
    )
    leaf, weight = hidden.double().requires_grad_(), frozen.weight.double()
    (leaf @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0].backward(outward.double())
    size = leaf.grad.norm(dim=1).clamp(min=1e-6)
    error, usual = ((found[layer] - leaf.grad).norm(dim=1) / size for layer in (frozen, trained))
    # also for tokens with a probability near 1
    assert (error <= 2 * usual + (1e-5 if dtype == torch.float32 else 1e-2)).all(), (error, usual)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_mixed_precision_multiplies_the_head_as_without_gradients(is_frozen: bool) -> None:
    model, hidden = make_llama().requires_grad_(not is_frozen), torch.randn(40, 32, requires_grad=True)
    targets = torch.arange(40)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        trained = head_token_logps(hidden, model.lm_head, targets)
        with torch.no_grad():
            evaluated = token_logps(hidden, head_of(model), targets, 264)
    trained.sum().backward()
    assert hidden.grad.dtype == torch.float32 and torch.allclose(trained, evaluated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi", "qwen2"])
def test_a_head_is_plain_only_where_it_is_one_product(family: str) -> None:
    assert family in FAMILIES
    assert has_plain_head(make_model(family)) == (family in ("llama", "qwen2"))


def test_squared_probs_of_a_vocabulary_are_those_of_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", {"cpu": 16 * 264})
    model, hidden = make_llama(), torch.randn(50, 32, requires_grad=True)
    found = log_squared_probs(hidden, head_of(model), 264)
    expected = model.lm_head(hidden).detach().double().softmax(-1).square().sum(-1).log()
    assert not found.requires_grad and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)
