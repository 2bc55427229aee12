"""Pin the defaults of configs: add model types, kinds of adapters and fields that the file has not.

    python -m tests.lm.model.write_defaults

An entry that is there never changes: identities of checkpoints that leave the field out depend on it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_cache.lm.model.config_fields import DEFAULTS_FILE, UNMADE, inert_fields, plain


def installed_defaults() -> dict[str, dict[str, Any]]:
    """Model type, or kind of adapter -> the defaults of the installed libraries, without inert fields."""
    return {**_model_defaults(), **_adapter_defaults()}


def _model_defaults() -> dict[str, dict[str, Any]]:
    classes = {CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING}
    classes |= {
        kind.sub_configs["text_config"]
        for kind in classes
        if hasattr(kind.sub_configs.get("text_config"), "model_type")
    }
    found = {}
    for kind in classes:
        with contextlib.suppress(*UNMADE, ImportError):  # as where identities are made
            inert, fields = inert_fields(kind.model_type), plain(kind().to_dict())
            found[kind.model_type] = {name: value for name, value in fields.items() if name not in inert}
    found.pop("", None)
    return found


def _adapter_defaults() -> dict[str, dict[str, Any]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {}
    for kind, make in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        with contextlib.suppress(*UNMADE, ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fields = plain(make().to_dict())
            fields.pop("peft_version", None)
            found[f"adapter {kind.value}"] = fields
    return found


def main() -> None:
    pinned = json.loads(DEFAULTS_FILE.read_text()) if DEFAULTS_FILE.exists() else {}
    for name, fields in installed_defaults().items():
        pinned[name] = {**fields, **pinned.get(name, {})}
    lines = [f"  {json.dumps(name)}: {json.dumps(pinned[name], sort_keys=True)}" for name in sorted(pinned)]
    DEFAULTS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    main()
