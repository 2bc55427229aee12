from dpo_cache.store.format.differing_fields import differing_fields

BASE = {
    "scoring": 1,
    "weights": "5e" * 32,
    "config": {"model_type": "llama", "rms_norm_eps": 1e-6},
    "dtype": "float32",
}


def test_equal_identities_differ_in_nothing() -> None:
    assert differing_fields(BASE, dict(reversed(BASE.items()))) == []


def test_each_field_is_a_line_shallow_ones_first() -> None:
    other = {
        **BASE,
        "weights": "1f" * 32,
        "dtype": "bfloat16",
        "config": {"model_type": "llama", "rms_norm_eps": 1e-3, "rope_theta": 5e5},
        "quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    assert differing_fields(BASE, other) == [
        "dtype: float32 and bfloat16",
        "weights: 5e5e5e5e5e5e… and 1f1f1f1f1f1f…",
        "config.rms_norm_eps: 1e-06 and 0.001",
        "config.rope_theta: none and 500000.0",
        "quantization.load_in_4bit: none and True",
        "quantization.quant_method: none and bitsandbytes",
    ]


def test_an_adapter_is_a_field_like_any_other() -> None:
    assert differing_fields({**BASE, "adapter": "aa" * 32}, {**BASE, "adapter": "bb" * 32}) == [
        "adapter: aaaaaaaaaaaa… and bbbbbbbbbbbb…"
    ]
    assert differing_fields(BASE, {**BASE, "adapter": "bb" * 32}) == ["adapter: none and bbbbbbbbbbbb…"]


def test_long_values_are_cut() -> None:
    (line,) = differing_fields({"chat_template": "x" * 300}, {"chat_template": None})
    assert line == f"chat_template: {'x' * 39}… and none"
