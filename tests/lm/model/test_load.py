"""Which checkpoints are causal LMs, by their config; and configs that transformers refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.load import check_causal, load_config


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (hf.LlamaConfig, "LlamaForCausalLM"),
        (hf.GPT2Config, "GPT2LMHeadModel"),
        (hf.BertGenerationConfig, "BertGenerationDecoder"),
        (hf.ReformerConfig, "ReformerModelWithLMHead"),
        (hf.XLMConfig, "XLMWithLMHeadModel"),
        (hf.Gemma3Config, "Gemma3ForConditionalGeneration"),
        (hf.Llama4Config, "Llama4ForConditionalGeneration"),  # of which transformers loads the part for text
    ],
)
def test_transformers_loads_a_causal_lm_from_it(config: type[hf.PreTrainedConfig], architecture: str) -> None:
    check_causal(config(architectures=[architecture]), "here")


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (hf.LlamaConfig, "LlamaModel"),
        (hf.BertConfig, "BertForMaskedLM"),
        (hf.T5Config, "T5ForConditionalGeneration"),
        (hf.BartConfig, "BartForConditionalGeneration"),  # its decoder by itself would have random weights
        (hf.LlavaConfig, "LlavaForConditionalGeneration"),
    ],
)
def test_it_has_no_causal_lm_head(config: type[hf.PreTrainedConfig], architecture: str) -> None:
    with pytest.raises(
        ModelError, match=f"here: its architecture is {architecture}, which has no causal LM head"
    ):
        check_causal(config(architectures=[architecture]), "here")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
        ({"hidden_size": 30, "num_attention_heads": 4}, ["hidden size (30)", "heads (4)"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"layer_types": ["full_attention", "sideways_attention"]}, ["layer_types", "sideways_attention"]),
        ({"model_type": "unheard_of"}, ["unheard_of"]),
    ],
    ids=lambda value: ", ".join(value),
)
def test_a_config_that_is_refused_is_an_error_with_its_field_and_value(
    fields: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    config = hf.LlamaConfig(num_hidden_layers=2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ModelError) as caught:
        load_config(str(tmp_path))
    first, *_ = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: no model can be loaded from it (")
    assert all(part in first for part in named), first
