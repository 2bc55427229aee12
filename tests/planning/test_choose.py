"""The preset of a run that names none: the first whose tensors fit the free memory."""

import pytest
import torch
from transformers import LlamaConfig

from dpo_cache.options.placement import ADAPTER_PRESETS, PRESETS
from dpo_cache.planning.choose import choose_placement, first_that_fits, staying_bytes
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model

EIGHT_B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
FULL, LORA = Method(precision="bf16"), Method(precision="bf16", lora_r=16)


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("method", "free_gb", "expected"),
    [
        (FULL, 140, "fast"),  # 2 + 2 + 8 bytes a weight: 96.4 GB
        (FULL, 80, "small"),  # 16.1 GB of weights
        (FULL, 24, "small"),
        (FULL, 16, "least"),
        (FULL, 1, "least"),  # nothing is smaller
        (LORA, 24, "fast"),
        (LORA, 16, "least"),
    ],
    ids=str,
)
def test_the_first_preset_that_fits(method: Method, free_gb: float, expected: str) -> None:
    is_adapted = method.lora_r is not None
    name, placement = first_that_fits(
        measure_model(EIGHT_B, method), int(free_gb * 1e9), is_adapted=is_adapted
    )
    assert name == expected
    assert placement == (ADAPTER_PRESETS if is_adapted else PRESETS)[name]


def test_presets_keep_less_and_less_on_the_device() -> None:
    sizes = measure_model(EIGHT_B, FULL)
    kept = [staying_bytes(sizes, placement) for placement in PRESETS.values()]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == pytest.approx(12 * 8.03e9, rel=1e-3)


def test_a_device_with_the_hosts_memory_keeps_everything() -> None:
    assert choose_placement(EIGHT_B, FULL, torch.device("cpu"))[0] == "fast"
