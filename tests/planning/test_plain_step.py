"""The counted peak of a step is that of torch's allocator when the step is computed."""

import pytest

from dpo_cache.planning import footprint
from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model
from dpo_cache.planning.plain_step import passes_peak
from tests.conftest import make_llama
from tests.planning.test_footprint import SIZES, pairs

# so wide that masks count little: they come from numpy, whose memory torch's allocator does not see
WIDE = {**SIZES, "hidden_size": 384, "intermediate_size": 768}


def trained(lora_r: int | None = None) -> int:
    return measure_model(make_llama(**WIDE).config, Method("fp32", lora_r=lora_r)).trained


@pytest.mark.rotating(3)
@pytest.mark.parametrize("mode", ["cheap", "full"])
@pytest.mark.parametrize("lengths", [[60], [60, 60], [300, 60, 30]])
def test_the_first_forest_makes_the_gradients_and_the_second_adds_to_them(
    mode: str, lengths: list[int]
) -> None:
    config = make_llama(**WIDE).config
    forests = [pairs(2, prompt) for prompt in lengths]
    counted = passes_peak(
        config,
        Method("fp32"),
        forests,
        recomputation=mode,
        alike=True,
        gradients=trained(),
        device_type="cpu",
    )
    model = footprint.policy_of(make_llama(**WIDE), mode)

    def step() -> None:
        for forest in forests:
            footprint.pass_loss(forest)(model).backward()

    assert counted == pytest.approx(allocated_peak(step), rel=0.04)
    assert counted > sum(parameter.nbytes for parameter in model.parameters())


def test_adapters_have_small_gradients() -> None:
    pytest.importorskip("peft")
    config, forests = make_llama(**WIDE).config, [pairs(2), pairs(2)]
    method = Method("fp32", lora_r=4)
    counted = passes_peak(
        config, method, forests, recomputation="cheap", alike=True, gradients=trained(4), device_type="cpu"
    )
    model = make_llama(**WIDE)
    footprint._add_adapters(model, 4)
    model = footprint.policy_of(model, "cheap")
    assert counted == pytest.approx(
        allocated_peak(lambda: [footprint.pass_loss(forest)(model).backward() for forest in forests]),
        rel=0.04,
    )


def test_tied_embeddings_add_their_gradient_at_the_end_of_few_layers_and_not_of_many() -> None:
    """The highest moment is the embeddings' gradient in a model of few layers, the top in a deep one."""
    config = make_llama(
        **{**SIZES, "num_hidden_layers": 12, "tie_word_embeddings": True, "vocab_size": 3000}
    ).config
    forests = [pairs(2), pairs(2)]
    given = {"recomputation": "none", "gradients": measure_model(config, Method("fp32")).trained}
    few = passes_peak(config, Method("fp32"), forests, alike=True, **given)
    assert few == passes_peak(config, Method("fp32"), forests, alike=False, **given)
