"""A checkpoint -> a causal LM, or a language model less its towers, without missing weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.model.adapter import WEIGHTS_FILE, CheckpointLocation, locate_checkpoint
from dpo_cache.lm.model.adapter_weights import (
    fit_vocabulary,
    load_adapter,
    may_resize,
    vocabulary_size,
)
from dpo_cache.lm.model.architecture import check_causal, check_one_text_model
from dpo_cache.lm.model.code_digest import ENTRIES, code_options
from dpo_cache.lm.model.quantization import (
    check_quantizable,
    check_saved_quantization,
    is_quantized,
    loading_config,
    prepare_layers,
)
from dpo_cache.lm.model.tensor_names import FAILURES, make_empty_for
from dpo_cache.lm.model.towers import as_whole, loading_class
from dpo_cache.lm.model.unchanged import check_unchanged, note_files
from dpo_cache.log import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_config(
    location: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The model's config, without its weights; of an adapter, its base's, with as many tokens as the adapter
    has. Raises `ModelError`.
    """
    parts = locate_checkpoint(location, revision)
    config = _config_of(parts, location, trust_remote_code)
    text = config.get_text_config()
    if parts.adapter is not None and may_resize(parts.adapter, text.vocab_size):
        text.vocab_size = _adapted_vocabulary(
            config, parts.adapter, code_options(parts.base, config, trust_remote_code)
        )
    return config


def _adapted_vocabulary(config: PreTrainedConfig, adapter: str, code: dict[str, Any]) -> int:
    """The number of tokens of the base with the adapter."""
    try:
        model = make_empty_for(config, Path(adapter, WEIGHTS_FILE), **code)
        fit_vocabulary(model, adapter)
    except FAILURES:  # loading the model raises an error, or needs its weights
        return config.get_text_config().vocab_size
    return vocabulary_size(model)


def _config_of(parts: CheckpointLocation, location: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a located base; errors name `location`, the user's option."""
    if Path(parts.base).is_dir():
        note_files([Path(parts.base, "config.json")])
    try:
        config = AutoConfig.from_pretrained(
            parts.base, revision=parts.base_revision, trust_remote_code=trust_remote_code
        )
        check_one_text_model(config, location)
    except (*FAILURES, StrictDataclassError) as error:
        raise ModelError(
            f"{location}: no model can be loaded from it ({first_line(error)}).\n"
            "Give a local folder with config.json, or a Hub id."
        ) from error
    _check_kinds(config, location)
    for one in (config, config.get_text_config()):
        one.return_dict = True  # outputs are read by name
        one.output_hidden_states = one.output_attentions = False  # in falcon they change the numbers
    return config


def _check_kinds(config: PreTrainedConfig, location: str) -> None:
    """Raise `ModelError` for fields whose values are of a kind that transformers takes, but cannot use."""
    names, mapped = config.architectures, getattr(config, "auto_map", None)
    entries = mapped if isinstance(mapped, dict) else {}
    wrong = [
        (field, value, expected)
        for field, value, expected, is_right in (
            ("architectures", names, "a list of names of classes", _is_list_of_texts(names or [])),
            (
                "auto_map",
                mapped,
                "an object that names classes in files",
                mapped is None or isinstance(mapped, dict),
            ),
            *(
                (f"{entry} in auto_map", entries[entry], "a class in a file", isinstance(entries[entry], str))
                for entry in ENTRIES
                if entry in entries
            ),
            (
                "text_config",
                getattr(config, "text_config", None),
                f"the config of a text model, which {config.model_type} does not have",
                isinstance(config.get_text_config(), PreTrainedConfig),
            ),
        )
        if not is_right
    ]
    if wrong:
        field, value, expected = wrong[0]
        raise ModelError(
            f"{location}: no model can be loaded from it ({field} in its config.json is {value!r}; expected "
            f"{expected}).\nCorrect the field, or take it out."
        )


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


@phase("loading the model")
def load_model(
    location: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The causal LM in eval mode on the device, of an adapter its base with the adapter in it. Raises
    `ModelError`, also where a weight is missing. A checkpoint with towers is loaded in its own class, without
    them.

    `quantize` 8bit or 4bit holds the linear layers of the decoder in so many bits, frozen; all other weights
    have `dtype`. 4-bit weights are multiplied in `compute_dtype` (default: `dtype`).

    Only safetensors are read: a pickled checkpoint can run code. Training keeps eval mode: the reference is
    scored without dropout, so the policy is trained without it.
    """
    parts = locate_checkpoint(location, revision)
    model = load_base(
        parts,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        compute_dtype=compute_dtype,
    )
    if parts.adapter is not None:
        load_adapter(model, parts.adapter)
    return model


def load_base(
    parts: CheckpointLocation,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    quantize: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The base of `load_model`, without an adapter.

    Raises `ModelError` also for files that changed since they were hashed, in a block of `one_checkpoint`.
    """
    model = read_base(
        parts,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        compute_dtype=compute_dtype,
    )
    if not is_quantized(model):
        model.to(device)  # type: ignore[arg-type]  # mypy: the decorator of `to`
    return model


def read_base(
    parts: CheckpointLocation,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    quantize: str = "none",
    compute_dtype: torch.dtype | None = None,
    placing: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The same, but only quantized weights are on the device: the others are on the CPU, or where the
    arguments of transformers in `placing` have them.
    """
    location, revision = parts.base, parts.base_revision
    config = _config_of(parts, location, trust_remote_code)
    check_causal(config, location)
    check_quantizable(config, location, quantize)
    check_saved_quantization(config, location)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "revision": revision,
        "use_safetensors": True,
        **code_options(location, config, trust_remote_code),
        **(placing or {}),
    }
    if quantize != "none":
        options |= {"quantization_config": loading_config(quantize, compute_dtype or dtype)}
    if quantize != "none" or getattr(config, "quantization_config", None) is not None:
        options |= {"device_map": {"": device}}  # quantized on its final device: such weights are not moved
    try:
        adapter = Path(parts.adapter, WEIGHTS_FILE) if parts.adapter is not None else None
        kind = loading_class(config, adapter)
        with _quiet_transformers():
            source: Any = AutoModelForCausalLM if kind is None else kind
            loaded: Any = source.from_pretrained(location, output_loading_info=True, **options)
    except (*FAILURES, SafetensorError) as error:
        raise ModelError(f"{location}: no causal LM can be loaded from it ({first_line(error)}).") from error
    model: Any = as_whole(loaded[0])
    report = loaded[1]
    lacking = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{location}: {len(lacking)} weights are not in the checkpoint or have another shape, first "
            f"{lacking[0]}.\n"
            "They would be random. Give a complete checkpoint of a causal LM."
        )
    if is_quantized(model):
        prepare_layers(model)
    check_unchanged()
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars, and its report on missing weights, which `load_base` checks."""
    bars_shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_shown:
            transformers_logging.enable_progress_bar()
