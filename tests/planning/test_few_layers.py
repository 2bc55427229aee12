"""Counts of deep models from a few of their layers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, Qwen3Config

from dpo_cache.planning.few_layers import are_alike, num_layers, over_layers, with_layers
from dpo_cache.planning.footprint import build_fake, pass_loss, phase_peaks_of, policy_of
from tests.conftest import make_llama
from tests.planning.test_footprint import pairs


def activations(config: PreTrainedConfig, mode: str) -> list[int]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return phase_peaks_of(policy_of(build_fake(config, torch.float32), mode), pass_loss(pairs(1)))


@pytest.mark.rotating(2)
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_a_few_alike_layers_give_the_count_of_all(mode: str) -> None:
    config = make_llama(num_hidden_layers=6).config
    seen: list[int] = []

    def count(one: PreTrainedConfig) -> list[int]:
        seen.append(num_layers(one))
        return activations(one, mode)

    found = over_layers(count, config, alike=True)
    assert found == max(activations(config, mode))
    assert max(seen) == 3 or mode == "full"  # where it does not grow evenly, all layers are counted


def test_layers_that_differ_are_all_counted() -> None:
    seen: list[int] = []
    over_layers(
        lambda one: seen.append(num_layers(one)) or [1], make_llama(num_hidden_layers=6).config, alike=False
    )
    assert seen == [6]


def test_a_count_that_does_not_grow_evenly_is_made_of_all_layers() -> None:
    config = make_llama(num_hidden_layers=9).config
    # the first moment is the highest up to four layers, then the last one is
    assert over_layers(lambda one: [max(100, 30 * num_layers(one))], config, alike=True) == 270
    assert over_layers(lambda one: [max(50, 30 * num_layers(one))], config, alike=True) == 270


def test_a_phase_that_is_low_in_a_few_layers_may_be_the_highest_in_all() -> None:
    config = make_llama(num_hidden_layers=9).config
    assert (
        over_layers(lambda one: [30 * num_layers(one), 100 + 5 * num_layers(one)], config, alike=True) == 270
    )


def test_lists_with_an_entry_for_each_layer_are_cut() -> None:
    config = Qwen3Config(num_hidden_layers=4, layer_types=["full_attention"] * 4, hidden_size=32)
    cut = with_layers(config, 2)
    assert (cut.num_hidden_layers, cut.layer_types) == (2, ["full_attention"] * 2)
    assert (config.num_hidden_layers, len(config.layer_types)) == (4, 4)


def test_layers_are_alike_if_they_hold_the_same_tensors() -> None:
    model = make_llama()
    assert are_alike(model)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 47, bias=False)
    assert not are_alike(model)
