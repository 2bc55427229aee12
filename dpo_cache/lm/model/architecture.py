"""The kind of model in a checkpoint, by its config: a causal LM, a language model with towers for images
and sound, or one that gives no log-probs to a row of tokens.
"""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from dpo_cache.errors import ModelError

# Model type -> class of a language model with towers; older versions of transformers lack the second mapping
WITH_TOWERS: tuple[dict[str, str], ...] = (
    dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    dict(getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})),
)
ENCODERS = frozenset(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
# also has language models that hear, which are no encoder-decoders by their configs (AudioFlamingo3)
SEQ_TO_SEQ = dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
GIVE_ANOTHER = "Give a model whose architecture ends in ForCausalLM or LMHeadModel"


def whole_name(config: PreTrainedConfig) -> str | None:
    """The name of transformers' class for the whole checkpoint, where it was saved as a language model with
    towers; None for one that was saved as a causal LM, or by code of its own.
    """
    if not type(config).__module__.startswith("transformers."):
        return None
    known = {mapping.get(config.model_type) for mapping in WITH_TOWERS}
    if not _is_encoder_decoder(config):
        known.add(SEQ_TO_SEQ.get(config.model_type))
    return next((name for name in config.architectures or [] if name in known), None)


def auto_class(config: PreTrainedConfig) -> str:
    """The name of transformers' class that loads a model with this config as it was saved."""
    name = whole_name(config)
    if name is None:
        return "AutoModelForCausalLM"
    kinds = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    mappings = zip(kinds, WITH_TOWERS, strict=True)
    found = (kind for kind, mapping in mappings if mapping.get(config.model_type) == name)
    return next(found, "AutoModelForSeq2SeqLM")


def check_causal(config: PreTrainedConfig, location: str) -> None:
    """Raise `ModelError` unless it was saved as a causal LM, or as a language model with towers."""
    names = config.architectures or []
    mapped = CAUSAL.get(config.model_type)
    suffixes: tuple[str, ...] = ("ForCausalLM", "LMHeadModel")
    if mapped is not None and "text_config" in config.sub_configs:
        suffixes += ("ForConditionalGeneration",)
    is_causal = not names or any(name.endswith(suffixes) or name == mapped for name in names)
    has_towers = whole_name(config) is not None and not _is_encoder_decoder(config)
    has_towers = has_towers and hasattr(config.get_text_config(), "vocab_size")  # not of actions of a robot
    if not is_causal and not has_towers:
        kind = _kind_of(config, names[0])
        raise ModelError(f"{location}: its architecture is {', '.join(names)}, {kind}.\n{GIVE_ANOTHER}.")


def check_one_text_model(config: PreTrainedConfig, location: str) -> None:
    """Raise `ModelError` for an encoder-decoder whose two parts have configs of their own."""
    try:
        config.get_text_config()
    except ValueError:
        if not _is_encoder_decoder(config):
            raise
        names = ", ".join(config.architectures or []) or config.model_type
        raise ModelError(
            f"{location}: its architecture is {names}, in a config of an encoder-decoder.\n"
            f"{GIVE_ANOTHER}, with a config of its own."
        ) from None


def _kind_of(config: PreTrainedConfig, name: str) -> str:
    """A description of an architecture that is no causal LM."""
    if name.endswith(("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel")):
        return "which has a head for labels or scores, and no causal LM head"
    if "Encoder" in name and "Decoder" not in name:
        return "an encoder: no token is predicted from those before it"
    if _is_encoder_decoder(config) or name in SEQ_TO_SEQ.values():
        return "an encoder-decoder: it reads the prompt and the answer by two models, not as one row"
    if config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        return "an encoder: no token is predicted from those before it"
    return "which has no causal LM head"


def _is_encoder_decoder(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))
