"""Which checkpoints are causal LMs, by their config."""

import pytest
import transformers as hf

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.load import check_causal


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
