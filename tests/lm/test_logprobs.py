import pytest
import torch

from dpo_cache.lm import logprobs
from dpo_cache.lm.logprobs import head_of, token_logps
from tests.conftest import make_llama


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 50])
def test_chunks_equal_one_log_softmax(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 16 * 264)
    model = make_llama()
    hidden, targets = torch.randn(num_tokens, 32), torch.randint(0, 264, (num_tokens,))
    with torch.no_grad():
        found = token_logps(hidden, head_of(model), targets, 264)
        expected = model.lm_head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 16 * 264)
    model, rows = make_llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[-2]))
    hidden = torch.randn(70, 32, requires_grad=True)
    token_logps(hidden, head_of(model), torch.zeros(70, dtype=torch.long), 264).sum().backward()
    assert max(rows) == 16
    assert sum(rows) == 2 * 70  # once forward, once more in the backward pass


def test_the_head_is_a_view_and_leaves_the_model_as_it_is() -> None:
    model = make_llama()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    head = head_of(model)
    head(torch.randn(3, 32))
    assert torch.equal(model(input_ids=ids).logits, before)
    model.lm_head.weight.data.zero_()
    assert not head(torch.randn(3, 32)).any()
