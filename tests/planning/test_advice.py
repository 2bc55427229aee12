"""What a lack of memory is told to do: the next preset, with what it keeps on the device."""

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from dpo_cache.options.placement import ADAPTER_PRESETS, FAST, PRESETS, Placement, next_preset
from dpo_cache.planning.advice import less_memory
from dpo_cache.planning.parts import Method
from tests.conftest import make_llama


@pytest.mark.parametrize("presets", [PRESETS, ADAPTER_PRESETS])
def test_each_preset_names_the_next_one(presets: dict[str, Placement]) -> None:
    assert [next_preset(placement) for placement in presets.values()] == ["small", "least", None]
    assert next_preset(Placement()) == "small"


def test_the_size_is_that_of_what_stays() -> None:
    config = make_llama().config
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    head, norm = 264 * 32, 32
    small = 4 * (2 * layer + head + norm)
    assert less_memory(config, Method("fp32"), FAST) == (
        f"`memory` small ({small / 1e3:.1f} kB of weights and buffers on the device)"
    )
    assert less_memory(config, Method("fp32"), PRESETS["small"]).startswith("`memory` least (")
    assert less_memory(config, Method("fp32"), PRESETS["least"]) == ""


def test_a_config_whose_sizes_are_not_known_gets_the_name() -> None:
    assert less_memory(PreTrainedConfig(), Method("fp32"), FAST) == "`memory` small"
    assert "memory" in less_memory(LlamaConfig(num_hidden_layers=1, hidden_size=32), Method("fp32"), FAST)
