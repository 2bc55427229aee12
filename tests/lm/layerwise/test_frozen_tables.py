"""Frozen tables of embeddings on the host: which they are, and a model that runs as before."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from dpo_cache.lm.device import check_one_device
from dpo_cache.lm.layerwise import frozen_tables as module
from dpo_cache.lm.layerwise.frozen_tables import frozen_tables, tables_on_host
from dpo_cache.lm.layerwise.held import Held, held_in
from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.lm.model.adapter import add_adapter
from tests.conftest import make_llama

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 64, 3]])


def found(model: PreTrainedModel) -> list[torch.nn.Module]:
    return frozen_tables(model, {*decoder_layers(model)})


def frozen(**changes: Any) -> PreTrainedModel:
    return make_llama(**changes).requires_grad_(requires_grad=False)


def test_a_table_that_is_trained_or_the_head_too_stays() -> None:
    model = frozen()
    assert found(model) == [model.model.embed_tokens]
    assert found(frozen(tie_word_embeddings=True)) == []
    assert found(make_llama()) == []
    model.get_output_embeddings = lambda: None  # its code may multiply by the table
    assert found(model) == []


@pytest.mark.parametrize(
    ("adapter", "stays"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9]}}, True),
    ],
    ids=str,
)
def test_a_table_under_an_adapter_stays(adapter: dict[str, Any], stays: bool) -> None:
    peft = pytest.importorskip("peft")
    model = make_llama()
    add_adapter(model, peft.LoraConfig(r=2, **adapter), seed=0, log=lambda _: None)
    assert found(model) == ([] if stays else [model.model.embed_tokens])


def make_gemma() -> PreTrainedModel:
    """Its table has a factor, in a buffer."""
    config = Gemma3TextConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("make", [frozen, make_gemma])
def test_the_same_bits_and_gradients(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    (table,) = found(model)
    norm, before = model.model.norm.weight.requires_grad_(), dict(model.named_parameters())
    expected = model(IDS).logits
    expected.square().sum().backward()
    gradient, norm.grad = norm.grad, None
    looked_up, look_up = [], module.look_up
    monkeypatch.setattr(
        module, "look_up", lambda *args, **named: looked_up.append(1) or look_up(*args, **named)
    )
    kind = type(model)
    with tables_on_host(model, CPU):
        assert model.device == CPU and type(model).__name__ == kind.__name__
        logits = model(IDS).logits
        logits.square().sum().backward()
    assert looked_up and torch.equal(logits, expected) and torch.equal(norm.grad, gradient)
    assert type(model) is kind and "forward" not in table.__dict__
    assert all(before[name] is one for name, one in model.named_parameters())
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("make", [frozen, make_gemma])
def test_the_table_is_not_on_the_device(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of tensors without values, whose parameters cannot move and are replaced."""

    def move(held: Held, moved: torch.Tensor) -> None:
        is_parameter = isinstance(held.tensor, torch.nn.Parameter)
        held.put(torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved)

    monkeypatch.setattr(Held, "move", move)
    device = torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make()
        for held in held_in(model, ""):
            held.move(torch.empty(held.tensor.shape, dtype=held.tensor.dtype, device=device))
        (table,) = found(model)

        def on_device() -> int:
            return sum(one.nbytes for one in model.parameters() if one.device.type == device.type)

        before = on_device()
        assert before == sum(one.nbytes for one in model.parameters())
        with tables_on_host(model, device):
            assert before - on_device() == table.weight.nbytes
            assert model.device == device
            check_one_device(model)
        assert on_device() == before


@torch.no_grad()
@pytest.mark.parametrize("make", [frozen, make_gemma])
def test_rows_are_on_the_device(make: Any) -> None:
    model = make()
    (table,) = found(model)
    with tables_on_host(model, torch.device("meta")):
        rows = table(IDS)
        assert rows.device.type == "meta" and rows.shape == (1, 8, 32)
