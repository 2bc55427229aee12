"""The identity of a reference: the canonical description whose sha256 names it.

    {"scoring": 1, "weights": <hex>, "config": {...}, "dtype": "float32"}
    {..., "quantization": {...}}    for quantized weights: the settings in the checkpoint, or of `quantize`
    {..., "adapter": {...}}         for weights with an adapter: the digest of its tensors, and the fields of
                                    its config that change the computation

`weights` is the sha256 over the lines `name dtype shape sha256-of-bytes` of all tensors, sorted by name: it
does not depend on how a checkpoint is split into files. `config` holds the fields that differ from the
defaults of the model's class, less those that cannot change a log-prob. A model's name, revision, library
versions, device and attention kernel are provenance: recorded with the identity, not hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from dpo_cache.errors import ModelError, first_line
from dpo_cache.files.atomic import write_whole
from dpo_cache.lm.model.adapter import CONFIG_FILE, WEIGHTS_FILE, locate_checkpoint, read_config
from dpo_cache.lm.model.adapter import INERT_FIELDS as INERT_ADAPTER_FIELDS
from dpo_cache.lm.model.quantization import check_quantizable
from dpo_cache.types import QUANTIZATION_FIELDS

SCORING_VERSION = 1  # raised when the same model and ids would get other stored values

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
    }
)
# fmt: on


def reference_identity(
    location: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    quantize: str = "none",
) -> dict[str, Any]:
    """The identity of the model at a local folder or Hub id, from its files. Raises `ModelError`.

    `quantize` is that of `load_model`: none, 8bit or 4bit.
    """
    check_quantizable(config, location, quantize)
    parts = locate_checkpoint(location, revision)
    identity = identity_without_weights(config, dtype)
    identity["weights"] = weights_digest(checkpoint_files(parts.base, revision=parts.base_revision))
    if quantize != "none":
        identity["quantization"] = dict(QUANTIZATION_FIELDS[quantize])
    if parts.adapter is not None:
        identity["adapter"] = _adapter_identity(parts.adapter)
    return identity


def identity_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The entries of an identity that follow from the config and the dtype."""
    identity = {
        "scoring": SCORING_VERSION,
        "config": computing_fields(config),
        "dtype": str(dtype).removeprefix("torch."),
    }
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        is_plain = isinstance(quantization, dict)
        identity["quantization"] = dict(quantization) if is_plain else quantization.to_dict()
    return identity


def _adapter_identity(folder: str) -> dict[str, Any]:
    """The digest of an adapter's tensors, and the fields of its config that change the computation."""
    config = read_config(folder)
    fields, defaults = config.to_dict(), type(config)().to_dict()
    kept = {
        name: value
        for name, value in fields.items()
        if name not in INERT_ADAPTER_FIELDS and value != defaults.get(name)
    }
    return {
        "weights": weights_digest([Path(folder, WEIGHTS_FILE)]),
        "config": _plain({**kept, "peft_type": fields["peft_type"]}),
    }


def provenance(
    location: str, *, revision: str | None, device: torch.device, attention: str, tokenizer: str
) -> dict[str, Any]:
    """The source of the reference and the machine that computed it: recorded, not hashed."""
    return {
        "model": os.path.abspath(location) if os.path.isdir(location) else location,
        "revision": revision,
        "tokenizer": os.path.abspath(tokenizer) if os.path.isdir(tokenizer) else tokenizer,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": attention,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def computing_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's fields that decide the computation and differ from the defaults of its class, JSON-ready.

    Defaults are left out so that a field which a later transformers adds does not rename every reference.
    """
    fields = _plain(config.to_dict())
    try:
        defaults = _plain(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError):  # a class that cannot be made without arguments
        defaults = {}
    kept = {
        name: value
        for name, value in fields.items()
        if name not in INERT_FIELDS and (name not in defaults or value != defaults[name])
    }
    return {**kept, "model_type": config.model_type}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields, default=str, sort_keys=True))


def checkpoint_files(location: str, *, revision: str | None = None) -> list[Path]:
    """The safetensors files of a local folder or Hub id. Raises `ModelError` where there are none."""
    folder = Path(location)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    location,
                    revision=revision,
                    allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"],
                )
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{location}: no such folder, and the Hub does not have it or cannot be reached."
            ) from error
    if (folder / CONFIG_FILE).is_file():
        raise ModelError(
            f"{location}: holds an adapter, where a base with weights of its own is expected.\n"
            "Merge it into its base (peft)."
        )
    names, index = [], folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # before the index, as in transformers
        names = ["model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{index}: not an index of safetensors files ({first_line(error)}).\n"
                "Download or save the model again."
            ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if not names or missing:
        raise ModelError(
            f"{location}: {'no safetensors weights' if not names else f'{missing[0]} is missing'}.\n"
            "Pickled checkpoints (.bin) can run code and are not read: load and `save_pretrained` the "
            "model once to convert it."
        )
    return [folder / name for name in names]


def weights_digest(files: list[Path]) -> str:
    """Hex sha256 over all tensors by name, dtype, shape and bytes."""
    lines = dict(entry for path in files for entry in _tensor_lines(path).items())
    return hashlib.sha256("\n".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def _tensor_lines(path: Path) -> dict[str, str]:
    """One line a tensor, memoized by path, size, times and inode as git's index does."""
    path, status = path.resolve(), path.stat()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32] + ".json"
    memo = caches / "dpo-cache" / "digests" / name
    stamp = [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    try:
        remembered = json.loads(memo.read_text())
        if remembered["stamp"] == stamp:
            return remembered["lines"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or one of another version: hash again
    lines = _hash_tensors(path)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memo, json.dumps({"stamp": stamp, "lines": lines}), is_shared=True)
    except OSError:
        pass  # a home that cannot be written costs the next run a second hashing, nothing else
    return lines


def _hash_tensors(path: Path) -> dict[str, str]:
    lines = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor, entry = file.get_tensor(name), file.get_slice(name)
                digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
                lines[name] = f"{name} {entry.get_dtype()} {entry.get_shape()} {digest}"
    except SafetensorError as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}).\nDownload or save the model again."
        ) from error
    return lines
