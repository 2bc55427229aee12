"""Weights in 4 and 8 bits that travel: their gradients, also where the memory has other content by then."""

from pathlib import Path

import pytest
import torch

from dpo_cache.lm.layerwise import streamed
from dpo_cache.lm.layerwise.packed import LayerUse
from dpo_cache.lm.layerwise.self_check import layer_major_problem
from dpo_cache.lm.layerwise.states import DeviceStates
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load_streamed import load_streamed
from tests.conftest import make_llama
from tests.lm.layerwise.policies import layers_of, policy_of
from tests.lm.layerwise.transfers import FakeTransfer

pytest.importorskip("bitsandbytes")

NUM_LAYERS = 4
LINEAR = 7  # in a layer; the inputs of the first three of the first layer need no gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    make_llama(num_hidden_layers=NUM_LAYERS).save_pretrained(folder)
    return str(folder)


def problem_of(folder: str, quantize: str) -> str:
    """Of a layer-major run of a LoRA, compared with a plain run, whose backward pass fetches layers again."""
    model, weights = load_streamed(
        folder, dtype=torch.float32, device=torch.device("cpu"), quantize=quantize, transfer=FakeTransfer()
    )
    with weights:
        add_adapter(model, lora_config(2, None, "all-linear"), seed=0)
        with torch.no_grad():
            for name, one in model.named_parameters():
                if "lora_B" in name:
                    one.normal_(0, 0.1)
        policy = policy_of("llama", model=model)
        return layer_major_problem(policy, layers_of(policy), weights, DeviceStates())


@pytest.mark.rotating(2)
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_layer_runs_again_only_where_its_weights_have_left(
    folder: str, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, open_again = list[LayerUse](), LayerUse.open_again
    monkeypatch.setattr(LayerUse, "open_again", lambda use: again.append(use) or open_again(use))
    assert problem_of(folder, quantize) == ""
    assert len(again) == 2 * (NUM_LAYERS * LINEAR - 3)  # of two pieces in the plain run, and none besides


def test_without_that_gradients_would_be_others(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits, only a device whose memory is not the host's would show it."""
    monkeypatch.setattr(streamed, "is_packed", lambda _: False)
    assert "gradient" in problem_of(folder, "4bit")
