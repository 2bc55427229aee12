"""Lengths in configs: found wherever they are written, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import transformers as hf
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from dpo_cache.lm.check_rows import Run, plan_rows
from dpo_cache.lm.config_limits import CHUNK, POSITION, TOP_K, WINDOW, Limit, limits_of, rope_limit


def found(**fields: object) -> list[tuple[int, str]]:
    return [(limit.tokens, limit.field) for limit in limits_of(hf.LlamaConfig(**fields))]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(), []),
        (hf.MistralConfig(), [Limit(4096, "sliding_window", WINDOW)]),
        (hf.Qwen2Config(), []),  # its window is not in use
        (
            hf.Llama4TextConfig(),
            [Limit(8192, "attention_chunk_size", CHUNK), Limit(8192, "floor_scale", POSITION)],
        ),
        (hf.DeepseekV32Config(), [Limit(2048, "index_topk", TOP_K)]),
        (
            hf.DeepseekV4Config(sliding_window=100, index_topk=50, compress_rates={"a": 4, "b": 60}),
            [
                Limit(4, "compress_rates", CHUNK),
                Limit(50, "index_topk", TOP_K),
                Limit(60, "compress_rates", CHUNK),
                Limit(100, "sliding_window", WINDOW),
                Limit(200, "index_topk", TOP_K),
                Limit(3000, "index_topk", TOP_K),
            ],
        ),
        (hf.Gemma3Config(), [Limit(4096, "sliding_window", WINDOW)]),  # of its text config, not its tower
    ],
    ids=lambda value: type(value).__name__,
)
def test_configs_of_transformers_name_these_lengths(config: PreTrainedConfig, expected: list[Limit]) -> None:
    assert limits_of(config) == expected


def test_lengths_are_found_in_dicts_and_lists_of_layers() -> None:
    assert found(swa={"inner": {"sliding_window": 40}}) == [(40, "sliding_window")]
    assert found(sliding_window=[64, 128, 64]) == [(64, "sliding_window"), (128, "sliding_window")]
    assert found(layers=[1, 2], sliding_window=None, local_attention=True) == []


@pytest.mark.parametrize(
    "field",
    [
        "my_window", "window_tokens", "attn_chunk", "local_span", "sparse_topk", "kv_budget", "late_threshold", "switch_position",
        "decay_after", "memory_segment", "key_stride", "max_seq_len_cached", "log_n_floor",
    ],
)  # fmt: skip
def test_a_field_of_other_code_counts_by_its_name(field: str) -> None:
    assert found(**{field: 300}) == [(300, field)]


@pytest.mark.parametrize(
    "field",
    ["num_local_experts", "moe_topk", "topk_group", "max_window_layers", "n_block_layers", "local_heads"],
)
def test_counts_are_no_lengths(field: str) -> None:
    assert found(**{field: 300}) == []


def test_only_rotary_embeddings_that_depend_on_the_row_have_a_limit() -> None:
    def config(**rope: object) -> hf.LlamaConfig:
        return hf.LlamaConfig(max_position_embeddings=900, rope_parameters={"rope_theta": 1e4, **rope})

    yarn = config(rope_type="yarn", factor=4.0, original_max_position_embeddings=100)
    assert rope_limit(yarn) is None and limits_of(yarn) == []
    dynamic = config(rope_type="dynamic", factor=4.0)
    assert rope_limit(dynamic) == Limit(900, "original_max_position_embeddings", POSITION)
    # a field that is not of the usual ones may make the length count
    scaled = config(rope_type="yarn", factor=4.0, original_max_position_embeddings=100, some_beta=0.1)
    assert [limit.tokens for limit in limits_of(scaled)] == [100]


@pytest.mark.rotating(2)
@pytest.mark.parametrize(("longest", "run_tokens"), [(1000, 100_000), (8000, 1_000_000)])
def test_a_run_of_usual_size_checks_all_lengths_of_every_family(longest: int, run_tokens: int) -> None:
    """At their default configs; shorter data needs no long row at all."""
    without_default = {"gemma4_assistant", "musicgen", "musicgen_melody"}
    for family in FAMILIES.keys() - without_default:
        limits = limits_of(getattr(hf, CONFIG_MAPPING_NAMES[family])())
        rows = plan_rows(264, limits, Run(longest, 1024, run_tokens))
        assert rows.unreached == [], family
        short = plan_rows(264, limits, Run(100, 1024, 5_000))
        assert short.longest <= 100 and short.unreached == [], family
        passed = [limit.tokens for limit in limits if limit.tokens < longest]
        assert all(any(length < len(row) for row in rows.long) for length in passed), family
