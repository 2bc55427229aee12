"""Models in memory whose computation was changed from outside have no identity."""

from pathlib import Path

import pytest
import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.loaded import identify_loaded
from tests.conftest import make_llama


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make_llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def load(folder: str) -> torch.nn.Module:
    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_an_unchanged_model_is_its_checkpoint(folder: str) -> None:
    expected = reference_identity(folder, load_config(folder), torch.float32)
    assert identify_loaded(load(folder)) == (expected, None)


def test_hooks_are_refused_and_named(folder: str) -> None:
    model = load(folder)
    handle = model.model.layers[1].register_forward_hook(lambda module, given, found: found)
    with pytest.raises(ModelError, match=r"model.layers.1 has hooks on its forward pass"):
        identify_loaded(model)
    handle.remove()
    assert identify_loaded(model)[1] is None
    model.register_forward_pre_hook(lambda module, given: None)
    with pytest.raises(ModelError, match="the model has hooks on its forward pass"):
        identify_loaded(model)


def test_a_method_that_was_replaced_is_refused_and_named(folder: str) -> None:
    model = load(folder)
    layer = model.model.layers[0].mlp
    real = layer.forward
    layer.forward = lambda hidden: 2 * real(hidden)
    with pytest.raises(ModelError, match=r"the method forward of model.layers.0.mlp was replaced"):
        identify_loaded(model)


def test_an_extra_tensor_in_the_files_does_not_make_it_another_model(folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(folder, "model.safetensors")
    save_file({**load_file(path), "extra": torch.ones(3)}, path, metadata={"format": "pt"})
    identity, difference = identify_loaded(load(folder))
    assert difference is None
    make_llama().save_pretrained(tmp_path / "plain")
    plain = str(tmp_path / "plain")
    assert identity == reference_identity(plain, load_config(plain), torch.float32)
