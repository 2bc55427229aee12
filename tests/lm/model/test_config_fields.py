"""Which fields of a config count, and that no default of an installed library moved from its pinned value."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, Gemma3Config, GPT2Config, LlamaConfig, OPTConfig

from dpo_cache.lm.model import config_fields
from dpo_cache.lm.model.config_fields import computing_fields, config_for_text, pinned_defaults
from tests.lm.model.write_defaults import installed_defaults


def test_no_default_of_an_installed_library_moved() -> None:
    """With `make test-newest`: an identity says it where a default moved, and this test names the fields.

    A field or a model type that is not pinned yet is compared with the installed class. Run
    `python -m tests.lm.model.write_defaults` to pin it.
    """
    pinned = pinned_defaults()
    moved = {
        f"{name}.{field}": (pinned[name][field], value)
        for name, fields in installed_defaults().items()
        for field, value in fields.items()
        if field in pinned.get(name, {}) and pinned[name][field] != value
    }
    assert moved == {}


def test_every_family_is_pinned() -> None:
    pinned = pinned_defaults()
    assert {"llama", "qwen3", "gemma3_text", "gpt2", "mamba2", "adapter LORA", "adapter IA3"} <= pinned.keys()
    assert pinned["llama"]["rms_norm_eps"] == 1e-06 and pinned["adapter LORA"]["lora_alpha"] == 8


def test_a_default_that_is_spelled_out_changes_nothing() -> None:
    assert (
        computing_fields(LlamaConfig(rms_norm_eps=1e-6))
        == computing_fields(LlamaConfig())
        == {"model_type": "llama"}
    )


def test_a_default_that_a_later_library_changes_is_another_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A config that leaves the field out has the new default, and is not the model that it was."""
    pinned = {**pinned_defaults(), "llama": {**pinned_defaults()["llama"], "rms_norm_eps": 1e-5}}
    monkeypatch.setattr(config_fields, "pinned_defaults", lambda: pinned)
    assert computing_fields(LlamaConfig()) == {"model_type": "llama", "rms_norm_eps": 1e-6}
    assert computing_fields(LlamaConfig(rms_norm_eps=1e-5)) == {"model_type": "llama"}


def test_a_field_that_a_later_library_adds_changes_nothing_at_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned = {**pinned_defaults(), "llama": dict(pinned_defaults()["llama"])}
    del pinned["llama"]["rms_norm_eps"]
    monkeypatch.setattr(config_fields, "pinned_defaults", lambda: pinned)
    assert computing_fields(LlamaConfig()) == {"model_type": "llama"}
    assert computing_fields(LlamaConfig(rms_norm_eps=1e-5)) == {"model_type": "llama", "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (GPT2Config, {"embd_pdrop": 0.3, "summary_first_dropout": 0.3, "classifier_dropout": 0.3}),
        (OPTConfig, {"dropout": 0.3, "layerdrop": 0.3, "attention_dropout": 0.3}),
        (LlamaConfig, {"attention_dropout": 0.5}),
    ],
)
def test_rates_of_dropout_do_not_count(make: Any, rates: dict[str, float]) -> None:
    known = {name: rate for name, rate in rates.items() if hasattr(make(), name)}
    assert computing_fields(make()) == computing_fields(make(**known))
    assert computing_fields(make(**rates)) == computing_fields(make(**dict.fromkeys(rates, 0.1)))


@pytest.mark.parametrize(
    ("model_type", "field", "is_counted"),
    [
        ("dory", "initializer_range", True),  # it divides by it
        ("llama", "initializer_range", False),
        ("xlm", "pad_token_id", True),  # it counts tokens that are not padding
        ("llama", "pad_token_id", False),
        ("llama", "auto_map", False),
    ],
)
def test_a_field_counts_where_the_code_of_the_family_computes_with_it(
    model_type: str, field: str, is_counted: bool
) -> None:
    values = {"auto_map": {"AutoModel": "m.M"}, "initializer_range": 0.5}
    make, value = CONFIG_MAPPING[model_type], values.get(field, 0)
    assert (computing_fields(make(**{field: value})) != computing_fields(make())) is is_counted
    pinned = pinned_defaults()[model_type].get(field)
    assert not is_counted or pinned == getattr(make(), field)


def test_a_switch_that_is_named_after_dropout_counts() -> None:
    assert computing_fields(LlamaConfig(token_dropout=True)) != computing_fields(
        LlamaConfig(token_dropout=False)
    )


def test_towers_for_images_and_sound_do_not_count() -> None:
    one, other = Gemma3Config(), Gemma3Config(vision_config={"hidden_size": 64})
    assert computing_fields(one) == computing_fields(other)
    text = Gemma3Config(text_config={"hidden_size": 64})
    assert computing_fields(one) != computing_fields(text)
    assert config_for_text(one) is one and config_for_text(LlamaConfig()).model_type == "llama"
