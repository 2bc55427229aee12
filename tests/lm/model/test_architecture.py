"""Which checkpoints are causal LMs, which have a language model with towers, and what the others are."""

import json
from pathlib import Path

import pytest
import transformers as hf

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.architecture import auto_class, check_causal, whole_name
from dpo_cache.lm.model.load import load_config


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
        (hf.Gemma3Config, "Gemma3ForConditionalGeneration"),
        (hf.LlavaConfig, "LlavaForConditionalGeneration"),
        (hf.Qwen2_5_VLConfig, "Qwen2_5_VLForConditionalGeneration"),
        (hf.MllamaConfig, "MllamaForConditionalGeneration"),
        (hf.AudioFlamingo3Config, "AudioFlamingo3ForConditionalGeneration"),
        (hf.MusicFlamingoConfig, "MusicFlamingoForConditionalGeneration"),
    ],
)
def test_a_language_model_with_towers_is_taken(config: type[hf.PreTrainedConfig], architecture: str) -> None:
    found = config(architectures=[architecture])
    check_causal(found, "here")
    assert whole_name(found) == architecture


@pytest.mark.parametrize(
    ("config", "architecture", "kind"),
    [
        (hf.LlamaConfig, "LlamaForCausalLM", "CausalLM"),
        (hf.T5Config, "T5ForConditionalGeneration", "CausalLM"),
        (hf.Gemma3Config, "Gemma3ForConditionalGeneration", "ImageTextToText"),
        (hf.Qwen2AudioConfig, "Qwen2AudioForConditionalGeneration", "MultimodalLM"),
        (hf.AudioFlamingo3Config, "AudioFlamingo3ForConditionalGeneration", "Seq2SeqLM"),
    ],
)
def test_the_class_that_loads_it(config: type[hf.PreTrainedConfig], architecture: str, kind: str) -> None:
    assert auto_class(config(architectures=[architecture])) == f"AutoModelFor{kind}"


@pytest.mark.parametrize(
    ("config", "architecture", "kind"),
    [
        (hf.LlamaConfig, "LlamaModel", "which has no causal LM head"),
        (hf.LlamaConfig, "LlamaForSequenceClassification", "which has a head for labels"),
        (hf.BertConfig, "BertForSequenceClassification", "which has a head for labels"),
        (hf.Gemma3Config, "ShieldGemma2ForImageClassification", "which has a head for labels"),
        (hf.BertConfig, "BertForMaskedLM", "an encoder:"),
        (hf.BertConfig, "BertModel", "an encoder:"),
        (hf.ModernBertConfig, "ModernBertForMaskedLM", "an encoder:"),
        (hf.T5Config, "T5EncoderModel", "an encoder:"),
        (hf.T5Config, "T5ForConditionalGeneration", "an encoder-decoder:"),
        (hf.LlamaConfig, "T5ForConditionalGeneration", "an encoder-decoder:"),
        # its decoder by itself would have random weights
        (hf.BartConfig, "BartForConditionalGeneration", "an encoder-decoder:"),
        (hf.MBartConfig, "MBartForConditionalGeneration", "an encoder-decoder:"),
        (hf.WhisperConfig, "WhisperForConditionalGeneration", "an encoder-decoder:"),
        (hf.Florence2Config, "Florence2ForConditionalGeneration", "an encoder-decoder:"),
        (hf.ViTConfig, "ViTModel", "which has no causal LM head"),
    ],
)
def test_what_another_checkpoint_is(config: type[hf.PreTrainedConfig], architecture: str, kind: str) -> None:
    with pytest.raises(ModelError, match=f"here: its architecture is {architecture}, {kind}"):
        check_causal(config(architectures=[architecture]), "here")


@pytest.mark.parametrize("family", ["musicgen", "vision-encoder-decoder"])
def test_an_encoder_decoder_of_two_configs_is_refused_as_that(family: str, tmp_path: Path) -> None:
    kinds = {
        "musicgen": ("text_encoder", "audio_encoder", "decoder"),
        "vision-encoder-decoder": ("encoder", "decoder"),
    }
    types = {"text_encoder": "t5", "audio_encoder": "encodec", "encoder": "vit"}
    parts = {
        name: {"model_type": types.get(name, "musicgen_decoder" if family == "musicgen" else "gpt2")}
        for name in kinds[family]
    }
    fields = {"model_type": family, "architectures": ["AnyModel"], "is_encoder_decoder": True, **parts}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="an encoder-decoder"):
        check_causal(load_config(str(tmp_path)), "here")
