"""Models that are spread over the CPU and disk: the same log-probs as loaded whole, and clear refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.forest.attention import Rules
from dpo_cache.lm.forest.kernels import plan_chunk
from dpo_cache.lm.forest.segments import Segment
from dpo_cache.lm.model import load_dispatched as module
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.load_dispatched import describe_places, load_dispatched
from dpo_cache.lm.runner import open_runner
from tests.conftest import make_completions, make_llama
from tests.lm.layerwise.test_streamed import make_gpt2, make_mixtral, make_qwen
from tests.lm.model.adapters import save_adapter

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 64, 3]])
FAMILIES = {
    "llama": lambda: make_llama(num_hidden_layers=4),
    "qwen2, tied": make_qwen,
    "mixtral": make_mixtral,
    "gpt2, tied": make_gpt2,
}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    FAMILIES[request.param]().eval().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def half_on_disk(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU may hold a part of the weights; accelerate keeps room for the largest layer."""
    size = Path(checkpoint, "model.safetensors").stat().st_size
    monkeypatch.setattr(module, "usual_limits", lambda _: {"cpu": int(0.7 * size)})


def dispatched(checkpoint: str, folder: Path) -> PreTrainedModel:
    return load_dispatched(checkpoint, dtype=torch.float32, device=CPU, offload_folder=str(folder))


@torch.no_grad()
@pytest.mark.usefixtures("half_on_disk")
def test_a_model_over_the_cpu_and_disk_gives_the_same_bits(checkpoint: str, tmp_path: Path) -> None:
    whole = load_model(checkpoint, dtype=torch.float32, device=CPU)
    spread = dispatched(checkpoint, tmp_path / "offloaded")
    assert {*spread.hf_device_map.values()} == {"cpu", "disk"}
    assert "on cpu" in describe_places(spread) and "on disk" in describe_places(spread)
    assert spread.device == CPU and any(one.is_meta for one in spread.parameters())
    for _ in range(2):
        assert torch.equal(spread(IDS).logits, whole(IDS).logits)
    assert any(one.is_meta for one in spread.parameters())  # still


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("half_on_disk")
def test_scores_of_a_model_that_is_spread_are_those_of_the_whole(checkpoint: str) -> None:
    completions, remarks, found = make_completions(), list[str](), {}
    for device_map in ("off", "auto"):
        with open_runner(
            checkpoint,
            dtype=torch.float32,
            device=CPU,
            max_length=80,
            device_map=device_map,
            log=remarks.append,
        ) as runner:
            assert runner.attention.name == "forest"
            steps = runner.score(completions, rows_of=lambda index: [index])
            found[device_map] = dict(pair for step in steps for pair in step.scores)
            wanted = [(one, np.arange(one.num_tokens)) for one in completions[:2]]
            own = runner.own_logps(wanted)
        for place, logps in enumerate(own):
            np.testing.assert_allclose(found[device_map][place].token_logps, logps, atol=1e-4)
    assert found["off"].keys() == found["auto"].keys() == {*range(len(completions))}
    for place, score in found["off"].items():
        np.testing.assert_allclose(found["auto"][place].token_logps, score.token_logps, atol=2e-5)
    assert [line for line in remarks if "spread" in line and "disk" in line]
    assert not [*Path(checkpoint).parent.glob("dpo-cache-weights-*")]


def test_a_model_that_fits_is_loaded_whole(checkpoint: str, tmp_path: Path) -> None:
    model = dispatched(checkpoint, tmp_path)
    assert not any(one.is_meta for one in model.parameters()) and not hasattr(model, "_hf_hook")


def test_adapters_and_quantized_weights_are_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ModelError, match="not an adapter on its base.\nLeave `device_map` out"):
        dispatched(str(tmp_path / "adapter"), tmp_path)
    with pytest.raises(ModelError, match="not quantized ones"):
        load_dispatched(
            str(tmp_path / "base"), dtype=torch.float32, device=CPU, offload_folder="", quantize="4bit"
        )


def test_a_plan_keeps_the_masks_of_each_device_apart() -> None:
    plan = plan_chunk([Segment(0, 3, 0), Segment(3, 5, 1), Segment(5, 9, 2)], 16, {}, CPU)
    for device in ("cpu", "meta"):
        one = torch.ones(1, 2, 9, 4, device=device)
        plan.attend(hash(device), one, one, one, Rules(0.5))
    assert {device.type for device in plan.masks} == {"cpu", "meta"}
    for device, masks in plan.masks.items():
        tensors = [one for mask in masks.values() for one in (mask if isinstance(mask, tuple) else (mask,))]
        assert {one.device.type for one in tensors} == {device.type}
