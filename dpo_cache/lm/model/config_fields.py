"""The fields of a config that decide the computation: what an identity keeps of a config.

Kept are the fields that differ from the defaults of their model type, so that a field which a later
transformers adds does not rename every reference. These defaults are pinned in `defaults.json`: if a later
transformers changes one, a config without the field has another value than the pinned one, and so another
identity, as its computation is another. Fields and model types that are not pinned are compared with the
defaults of the installed class. `python -m tests.lm.model.write_defaults` adds what is missing in the file,
and never changes an entry; `tests/lm/model/test_config_fields.py`, a part of `make test-newest`, names the
defaults that moved.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

# Errors of a class of configs that cannot be made without arguments
UNMADE = (TypeError, ValueError, AttributeError, StrictDataclassError)

DEFAULTS_FILE = Path(__file__).with_name("defaults.json")

# Fields of a config that cannot change the log-probs of a forward pass without dropout.
# fmt: off
INERT_FIELDS = frozenset(
    {
        "_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "dtype",
        "torch_dtype", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
        "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
        "sep_token_id", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
        "finetuning_task", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
        "hidden_dropout", "attention_dropout_prob", "hidden_dropout_prob", "dropout", "layerdrop",
        "chunk_size_feed_forward", "tokenizer_class", "prefix", "is_encoder_decoder",
        "router_aux_loss_coef", "output_router_logits", "pretraining_tp", "_attn_implementation",
        "_attn_implementation_autoset", "gradient_checkpointing",
        "quantization_config",  # an entry of its own
        "transformers_weights",  # the name of a file, whose content counts
        "auto_map",  # names of code, whose content counts where it runs
    }
)
# fmt: on

# Model types whose code computes with a field that is inert in the others: positions are counted from the id
# of the padding token on, or its vector is set to zero; embeddings of earlier tokens end at the last one.
# Dory divides by the spread of its first weights.
COUNTED_FIELDS = {
    "qwen4_exp_text": frozenset({"eos_token_id"}),
    "dory": frozenset({"initializer_range"}),
} | dict.fromkeys(
    (
        "camembert",
        "cohere_compass_text",
        "data2vec-text",
        "prophetnet",
        "roberta",
        "roberta-prelayernorm",
        "xglm",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "youtu",
    ),
    frozenset({"pad_token_id"}),
)

# Parts of the names of sub-configs for what a row of text never reaches
OTHER_MEDIA = ("vision", "audio", "image", "video", "speech", "vq_config")


def computing_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's fields that decide the computation and differ from the pinned defaults, JSON-ready."""
    config = config_for_text(config)
    fields, defaults = plain(config.to_dict()), _defaults_of(config)
    if (text := config.get_text_config()) is not config and "text_config" in fields:
        fields["text_config"] = computing_fields(text)
    inert = inert_fields(config.model_type)
    kept = {
        name: value
        for name, value in fields.items()
        if name not in inert
        and not _is_other_medium(name, value)
        and not (name in defaults and (value == defaults[name] or is_dropout(name, value)))
    }
    dropouts = {name: 0.0 for name, value in kept.items() if is_dropout(name, value)}
    return {**kept, **dropouts, "model_type": config.model_type}


def inert_fields(model_type: str) -> frozenset[str]:
    """The fields that cannot change the log-probs of a model of this type."""
    return INERT_FIELDS - COUNTED_FIELDS.get(model_type, frozenset())


def config_for_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the class that `AutoModelForCausalLM` makes: of text only, where that class is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    text = config.get_text_config()
    is_same_class = NAMES.get(text.model_type) == NAMES.get(config.model_type) is not None
    return text if is_same_class else config


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as they are after a round trip through JSON."""
    return json.loads(json.dumps(fields, default=str, sort_keys=True))


@cache
def pinned_defaults() -> dict[str, dict[str, Any]]:
    """Model type, or kind of adapter -> its fields' defaults."""
    return json.loads(DEFAULTS_FILE.read_text(encoding="utf-8"))


def _defaults_of(config: PreTrainedConfig) -> dict[str, Any]:
    try:
        defaults = plain(type(config)().to_dict())
    except UNMADE:
        defaults = {}
    is_known = type(config).__module__.startswith("transformers.")
    return defaults | (pinned_defaults().get(config.model_type, {}) if is_known else {})


def is_dropout(name: str, value: Any) -> bool:
    """Return whether the field is a rate of dropout, which is off in every forward pass here.

    A rate that the class does not know counts as 0.0, as such fields are usually written; this keeps the
    identities of these checkpoints.
    """
    is_rate = isinstance(value, int | float) and not isinstance(value, bool)
    return is_rate and (
        "dropout" in name or name.endswith(("pdrop", "layerdrop", "drop_rate", "drop_path_rate"))
    )


def _is_other_medium(name: str, value: Any) -> bool:
    return isinstance(value, dict) and any(part in name for part in OTHER_MEDIA)
