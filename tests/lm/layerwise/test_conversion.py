"""Which stored tensors make up a layer: of all of transformers' families a few, and what spans layers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Chunk, WeightConverter

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.conversion import find_pieces, pieces_by_layer
from dpo_cache.lm.layerwise.held import held_in
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.model.stored_tensors import StoredTensors
from tests.conftest import make_llama
from tests.families.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

CPU = torch.device("cpu")

# family -> what is special about its layers' tensors
FAMILIES = {
    "deepseek_v3": "a buffer that is stored, and stays in float32",
    "dbrx": "stacks of experts that are stored flat",
    "gpt_neox": "buffers that are not stored",
    "zamba": "weights that layers share",
    "qwen4_exp_text": "a converter that insists on the CPU",
    "aria": "layers of the text inside a model of images",
}


@pytest.mark.rotating(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_each_layer_are_those_of_the_resident_model(tmp_path: Path, family: str) -> None:
    """In float16, in which some weights of some families stay float32."""
    make_tiny(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float16, device=CPU)
    modules = dict(model.named_modules())
    streamed, weights = load_streamed(str(tmp_path), dtype=torch.float16, device=CPU, weights="disk")
    names = {module: name for name, module in streamed.named_modules()}
    with weights:
        for index, layer in enumerate(weights.layers):
            with weights.use(index):
                found = {one.name: one.tensor for one in held_in(layer, names[layer])}
                expected = {one.name: one.tensor for one in held_in(modules[names[layer]], names[layer])}
                assert found.keys() == expected.keys()
                for name, tensor in expected.items():
                    assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride()
                    assert torch.equal(found[name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("family", ["granitemoeshared", "zamba"])
def test_logits_are_those_of_the_resident_model(tmp_path: Path, family: str) -> None:
    """Granite's products round by where in a cache line the memory of its experts starts."""
    ids = torch.tensor([[5, 9, 200, 31, 7, 7, 64, 3]])
    make_tiny(family).save_pretrained(tmp_path)
    expected = load_model(str(tmp_path), dtype=torch.float32, device=CPU)(ids).logits
    model, weights = load_streamed(str(tmp_path), dtype=torch.float32, device=CPU, weights="disk")
    with weights:
        assert torch.equal(model(ids).logits, expected)


def test_a_tensor_that_holds_weights_of_several_layers_is_refused(tmp_path: Path) -> None:
    targets = [f"model.layers.{index}.input_layernorm.weight" for index in (0, 1)]
    mapping = [WeightConverter("model.all_norms", targets, [Chunk(dim=0)])]
    save_file({"model.all_norms": torch.ones(64)}, tmp_path / "model.safetensors")
    stored = StoredTensors([tmp_path / "model.safetensors"])
    model = make_llama()
    pieces = find_pieces(model, mapping, stored.tensors)
    with pytest.raises(ModelError, match=r"model\.all_norms: .*weights of several layers"):
        pieces_by_layer(model, pieces, ["model.layers.0", "model.layers.1"])
    stored.close()
