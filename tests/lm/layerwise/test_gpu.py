"""Weights that travel to a GPU: the bits of resident ones, whatever runs at the same time.

The tests are skipped where torch finds no CUDA device.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.layerwise.adapting import streamed_weights_of
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.streamed import PersistentCopies, StreamedWeights
from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.load_streamed import load_streamed
from tests.conftest import make_llama

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SIZES = {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 2048, "initializer_range": 0.05}


def ids() -> torch.Tensor:
    return torch.arange(256).view(4, 64).cuda()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    make_llama(**SIZES).bfloat16().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def busy() -> Iterator[None]:
    """Work that keeps the device behind the host, so that copies could overtake it."""
    matrix = torch.randn(8192, 8192, device=CUDA)
    for _ in range(20):
        matrix = (matrix @ matrix).tanh()
    yield
    torch.cuda.synchronize()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("embedding", ["device", "host"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_logits_are_those_of_the_resident_model(
    folder: str, place: str, embedding: str, dtype: torch.dtype, busy: None
) -> None:
    expected = load_model(folder, dtype=dtype, device=CUDA)(ids()).logits
    model, weights = load_streamed(folder, dtype=dtype, device=CUDA, weights=place, embedding=embedding)
    assert model.device == CUDA
    with weights:
        for _ in range(4):
            assert torch.equal(model(ids()).logits, expected)


@torch.no_grad()
def test_the_device_holds_two_layers(folder: str) -> None:
    model, weights = load_streamed(
        folder, dtype=torch.bfloat16, device=CUDA, weights="host", embedding="host"
    )
    layer_bytes = sum(one.nbytes for one in decoder_layers(model)[0].parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with weights:
        for index in range(6):
            with weights.use(index, then=(index + 1) % 6):
                pass
        assert torch.cuda.max_memory_allocated() - before < 2.1 * layer_bytes


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_packed_weights_travel(folder: str, quantize: str, busy: None) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"dtype": torch.bfloat16, "device": CUDA, "quantize": quantize}
    expected = load_model(folder, **options)(ids()).logits
    model, weights = load_streamed(folder, weights="host", **options)
    with weights, torch.no_grad():
        assert not any(one.is_cuda for one in decoder_layers(model)[3].parameters())
        for _ in range(2):
            assert torch.equal(model(ids()).logits, expected)


def test_an_adapter_is_on_the_device_and_has_the_gradients_of_a_resident_base(
    folder: str, busy: None
) -> None:
    grads = []
    for is_streamed in (False, True):
        options = {"dtype": torch.bfloat16, "device": CUDA}
        model = (
            load_streamed(folder, weights="disk", **options)[0]
            if is_streamed
            else load_model(folder, **options)
        )
        add_adapter(model, lora_config(8, None, "all-linear"), seed=0)
        layer, inputs = decoder_layers(model)[2], torch.linspace(-1, 1, 4 * 512, device=CUDA).view(1, 4, 512)
        rotary = model.model.rotary_emb(inputs.bfloat16(), torch.arange(4, device=CUDA)[None])
        weights = streamed_weights_of(model)
        with nullcontext() if weights is None else weights.use(2, then=3):
            layer(inputs.bfloat16(), position_embeddings=rotary).float().square().sum().backward()
        grads.append({name: one.grad for name, one in layer.named_parameters() if one.grad is not None})
        if weights is not None:
            weights.close()
    assert len(grads[0]) == 14 and grads[0].keys() == grads[1].keys()
    assert all(one.is_cuda and torch.equal(one, grads[0][name]) for name, one in grads[1].items())


@pytest.mark.parametrize("kind", [StreamedWeights, PersistentCopies])
def test_weights_that_are_trained_on_the_host_have_leaves_on_the_device(kind: type, busy: None) -> None:
    def loss_of(model: PreTrainedModel) -> torch.Tensor:
        return model(ids()).logits.float().square().mean()

    model, resident = make_llama(**SIZES), make_llama(**SIZES).cuda()
    with kind(model, decoder_layers(model), HostWeights(), CUDA, embedding="host") as weights:
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(loss_of(model), loss_of(resident))
                for one, other in zip(model.parameters(), resident.parameters(), strict=True):
                    one.add_(0.001)
                    other.add_(0.001)
            weights.refresh()
        inputs = torch.linspace(-1, 1, 4 * 512, device=CUDA).view(1, 4, 512)
        rotary = resident.model.rotary_emb(inputs, torch.arange(4, device=CUDA)[None])
        for layer in (decoder_layers(model)[1], decoder_layers(resident)[1]):
            with weights.use(1):
                layer(inputs, position_embeddings=rotary).square().sum().backward()
        expected = dict(decoder_layers(resident)[1].named_parameters())
        assert len(weights.leaves(1)) == len(expected)
        for name, leaf in weights.leaves(1).items():
            assert torch.equal(leaf.grad, expected[name.removeprefix("model.layers.1.")].grad)
