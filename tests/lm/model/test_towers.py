"""A language model with towers is loaded in its own class, without them."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.towers import frozen_towers, loading_class, text_filter, towers_of
from tests.families.tiny import make_tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def load(folder: Path) -> hf.PreTrainedModel:
    return load_model(str(folder), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("family", "towers"),
    [("mistral3", ["model.vision_tower"]), ("mllama", ["model.vision_model"]), ("llama4", ["vision_model"])],
)
def test_its_class_and_names_stay_and_its_towers_are_not_in_memory(
    family: str, towers: list[str], tmp_path: Path
) -> None:
    whole = make_tiny(family)
    assert towers_of(whole) == towers
    whole.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model) is type(whole) and towers_of(model) == []
    kept = {name: one for name, one in whole.state_dict().items() if not name.startswith(f"{towers[0]}.")}
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in kept.items())
    if family != "llama4":  # its own forward fails on text
        assert torch.equal(logits(model), logits(whole))


def test_a_language_model_that_hears_is_loaded_without_its_encoder(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": 64}
    sound = {**small, "model_type": "audioflamingo3_encoder", "num_mel_bins": 8}
    torch.manual_seed(0)
    whole = hf.AudioFlamingo3ForConditionalGeneration(
        hf.AudioFlamingo3Config(audio_config=sound, text_config=text, audio_token_id=63)
    ).eval()
    whole.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model) is type(whole) and towers_of(model) == []
    assert torch.equal(logits(model), logits(whole))


def test_llama_4_computes_what_its_language_model_does(tmp_path: Path) -> None:
    whole = make_tiny("llama4")
    whole.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(whole.language_model))


def test_a_causal_lm_is_loaded_as_before(tmp_path: Path) -> None:
    assert loading_class(hf.LlamaConfig(architectures=["LlamaForCausalLM"])) is None
    text = make_tiny("gemma3").config.get_text_config()
    text.architectures = ["Gemma3ForCausalLM"]
    assert loading_class(text) is None


def test_only_weights_that_text_reaches_are_trained() -> None:
    model = make_tiny("mistral3")
    is_for_text = text_filter(model)
    with frozen_towers(model):
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained and trained == {name for name, _ in model.named_parameters() if is_for_text(name)}
    assert not any("vision" in name or "projector" in name for name in trained)
    assert all(one.requires_grad for one in model.parameters())


def test_weights_under_the_names_of_earlier_versions(tmp_path: Path) -> None:
    """As Gemma 3 is on the Hub: `language_model.model.*`, `vision_tower.*`."""
    whole = make_tiny("gemma3")
    whole.save_pretrained(tmp_path)
    before = reference_identity(str(tmp_path), load_config(str(tmp_path)), torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", "language_model.model.").removeprefix("model."): one
        for name, one in stored.items()
    }
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    assert reference_identity(str(tmp_path), load_config(str(tmp_path)), torch.float32) == before
    assert torch.equal(logits(load(tmp_path)), logits(whole))


def save_adapter(base: Path, target: Path, model: hf.PreTrainedModel, names: str) -> torch.Tensor:
    """An adapter on this model of the base, with an update that is not zero; returns its logits."""
    model.name_or_path = str(base)
    adapted = add_adapter(model, lora_config(2, None, names), seed=0, log=lambda _: None)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    adapted.save_pretrained(str(target))
    return logits(model)


@pytest.mark.parametrize("kind", ["whole", "text"])
def test_an_adapter_of_either_class_is_put_into_that(kind: str, tmp_path: Path) -> None:
    """Adapters on the class that `AutoModelForCausalLM` makes name layers otherwise."""
    base, target = tmp_path / "base", tmp_path / "adapter"
    make_tiny("mllama").save_pretrained(base)
    auto = hf.AutoModelForCausalLM if kind == "text" else hf.AutoModelForImageTextToText
    model = auto.from_pretrained(base).eval()
    expected = save_adapter(base, target, model, "q_proj")
    found = load(target)
    assert type(found).__name__ == {"text": "MllamaForCausalLM"}.get(kind, "MllamaForConditionalGeneration")
    assert torch.equal(logits(found), expected)
    identity = reference_identity(str(target), load_config(str(target)), torch.float32)
    assert identity["adapter"]["modules"] > 0
    assert (
        identity["weights"] == reference_identity(str(base), load_config(str(base)), torch.float32)["weights"]
    )


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft's own code
def test_an_adapter_that_was_trained_on_the_towers_too_keeps_them(tmp_path: Path) -> None:
    import peft

    base, target = tmp_path / "base", tmp_path / "adapter"
    make_tiny("mistral3").save_pretrained(base)
    model = hf.AutoModelForImageTextToText.from_pretrained(base).eval()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.eval().save_pretrained(str(target))
    found = load(target)
    assert towers_of(found) and torch.equal(logits(found), logits(adapted))
