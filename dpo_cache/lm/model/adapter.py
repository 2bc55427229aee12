"""Adapters (PEFT): few trained weights on top of frozen ones.

A folder with `adapter_config.json` is a checkpoint whose other weights are in its base. A fresh adapter
changes nothing: the policy starts as its base, and with the adapter switched off it is always its base.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from dpo_cache.errors import ModelError, OptionError, first_line
from dpo_cache.files.locations import is_absolute
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.layerwise.adapting import adapting
from dpo_cache.lm.model.lora_targets import name_layers_of_text, without_unsuited_layers
from dpo_cache.lm.model.unchanged import commit_of
from dpo_cache.log import Log, log_remark

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

CHANGES_BASE = "dpo_cache_changes_base"  # an attribute of models whose adapter came with weights of the base

# Methods whose adapter is not part of the layers (virtual tokens), or that need a call for each step or task.
UNSUITED = ("ADALORA", "POLY", "XLORA", "ADAPTION_PROMPT", "CPT", "CARTRIDGE", "OSF")

UNSUITED_FIELDS = {
    "alora_invocation_tokens": "it acts from a certain token on, which differs from step to step",
    "layer_replication": "it changes the base, so that the base is not the reference",
    "megatron_config": "models of transformers have no Megatron layers",
}

# Fields of an adapter's config with names of layers, and where a user gives them
NAMES_OF_LAYERS = {
    "target_modules": "`lora_targets`, or target_modules of the adapter's config",
    "modules_to_save": "modules_to_save of the adapter's config",
}

# Errors of PEFT for a config that does not fit the model
PEFT_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, re.error)

# values of LoRA's setting; PiSSA, OLoRA, LoftQ and the like move a part of the base into the adapter
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
# values of LoRA's setting; the others start with a product of random matrices
STARTS_AT_ZERO = (True, "gaussian")


@dataclass(frozen=True)
class CheckpointLocation:
    """The location of a checkpoint's weights, and of the adapter on top of them, if there is one."""

    base: str
    base_revision: str | None
    adapter: str | None = None

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Location and revision of the tokenizer: the adapter's folder, if the tokenizer was saved there."""
        if self.adapter is not None and Path(self.adapter, "tokenizer_config.json").is_file():
            return self.adapter, None
        return self.base, self.base_revision


def locate_checkpoint(location: str, revision: str | None = None) -> CheckpointLocation:
    """The base and the adapter of a local folder or Hub id, each of a Hub at a commit.

    Raises `ModelError` for an adapter without its base.
    """
    revision = commit_of(location, revision)
    folder = _adapter_folder(location, revision)
    if folder is None:
        return CheckpointLocation(location, revision)
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        raise ModelError(
            f"{location}: holds an adapter and whole weights, so it is not clear which is meant.\n"
            "Move one of them to another folder."
        )
    config = _read_json(folder)
    base, base_revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / CONFIG_FILE}: names no base_model_name_or_path, the model that the adapter "
            "belongs to.\nWrite it there."
        )
    if is_absolute(base) and not os.path.isdir(base):
        raise ModelError(
            f"{location}: its base {base} is gone.\n"
            f"Correct base_model_name_or_path in {folder / CONFIG_FILE}."
        )
    return CheckpointLocation(base, commit_of(base, base_revision), str(folder))


def lora_config(rank: int, alpha: float | None, targets: str) -> PeftConfig:
    """LoRA of this rank (arXiv:2106.09685) on `targets`, names with commas between them or `all-linear`;
    alpha is twice the rank unless given.
    """
    peft = import_peft()
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )


def read_adapter_config(path: str) -> PeftConfig:
    """The config in a file like PEFT's `adapter_config.json`. Raises `OptionError`."""
    peft = import_peft()
    try:
        fields = dict(json.loads(Path(path).read_bytes()))
        make_config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")]
        return make_config(**{**fields, "inference_mode": False})
    except (OSError, ValueError, KeyError, TypeError) as error:
        detail = (
            error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
        )
        raise OptionError(
            f"`peft_config` {path}: no PEFT config can be read from it ({detail}).\n"
            "Give a file like adapter_config.json."
        ) from error


def add_adapter(model: PreTrainedModel, config: PeftConfig, *, seed: int, log: Log = log_remark) -> PeftModel:
    """Put a fresh adapter into the model and freeze the other weights; its random part depends only on the
    seed.

    The model is changed in place and is still the one to call; the returned object saves the adapter,
    switches it off and merges it. `log` gets a remark if `all-linear` leaves layers out.
    """
    peft = import_peft()
    check_suited(config)
    check_names(model, config)
    config = without_unsuited_layers(model, config, log)
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        without_library_warnings(),
    ):
        torch.manual_seed(seed)
        try:
            with adapting(model):
                adapted = peft.get_peft_model(model, config)
        except PEFT_ERRORS as error:
            if is_out_of_memory(error, model.device):
                raise OptionError(
                    f"the adapter does not fit into memory: {first_line(error)}\n"
                    "Use a smaller `lora_r` or fewer `lora_targets`."
                ) from error
            raise OptionError(
                f"{type(model).__name__} cannot take this adapter: {first_line(error)}\n"
                "See `lora_targets` or `peft_config`."
            ) from error
    name_layers_of_text(adapted)
    return adapted.eval()


def describe(adapted: PeftModel) -> str:
    """An adapter's kind, with its rank if it has one, such as `LORA, rank 16`."""
    config = adapted.peft_config["default"]
    rank = getattr(config, "r", None)
    return kind_of(config) + (f", rank {rank}" if isinstance(rank, int) else "")


def is_identity_at_init(adapted: PeftModel) -> bool:
    """Return whether a fresh adapter is known to leave the model's log-probs as they are."""
    config = adapted.peft_config["default"]
    return kind_of(config) == "IA3" or (
        kind_of(config) == "LORA" and getattr(config, "init_lora_weights", True) in STARTS_AT_ZERO
    )


def can_be_switched_off(adapted: PeftModel | None) -> bool:
    """Return whether `disable_adapter` restores the base: PEFT restores neither trained biases nor weights of
    the base that came with the adapter, such as resized embeddings.
    """
    return (
        adapted is not None
        and getattr(adapted.peft_config["default"], "bias", "none") == "none"
        and not getattr(adapted, CHANGES_BASE, False)
    )


def check_mergeable(adapted: PeftModel) -> None:
    """Raise `OptionError` where the merged model would differ from the trained one: embeddings and head share
    a weight, and only one of them has an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = adapted.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer) for end in ends
    ):
        raise OptionError(
            "`merge_adapter`: embeddings and LM head share one weight, and the adapter is on only one of "
            "them; merged, it would change both.\n"
            "Leave `merge_adapter` out, or take embeddings and head out of `lora_targets`."
        )


def kind_of(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _adapter_folder(location: str, revision: str | None) -> Path | None:
    if os.path.isdir(location):
        return Path(location) if Path(location, CONFIG_FILE).is_file() else None
    try:
        found = find_adapter_config_file(location, revision=revision)
    except OSError:  # missing or not reachable: loading the config raises a clear error
        return None
    if found is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(location, revision=revision, allow_patterns=["*.json", WEIGHTS_FILE, "*.jinja"])
    )


def _read_json(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / CONFIG_FILE}: not readable ({first_line(error)}).\nSave the adapter again."
        ) from error


def read_config(folder: str) -> PeftConfig:
    """The config of a saved adapter. Raises `ModelError`, also where it has no weights that can be loaded."""
    weights_file(folder)
    peft = import_peft()
    try:
        return peft.PeftConfig.from_pretrained(folder)
    except (*PEFT_ERRORS, OSError) as error:
        raise ModelError(
            f"{folder}: no adapter can be read from it ({first_line(error)}).\nSave the adapter again."
        ) from error


def weights_file(folder: str) -> Path:
    """The file with an adapter's tensors. Raises `ModelError` if it is missing."""
    path = Path(folder, WEIGHTS_FILE)
    if not path.is_file():
        raise ModelError(
            f"{folder}: {WEIGHTS_FILE} is missing.\n"
            "Save the adapter again as safetensors; pickled files can run code and are not read."
        )
    return path


@contextmanager
def without_library_warnings() -> Iterator[None]:
    """Ignore warnings that a user can do nothing about: peft uses deprecated names of transformers, and
    imports bitsandbytes, which lacks kernels for some CPUs.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def check_names(model: PreTrainedModel, config: PeftConfig) -> None:
    """Raise `OptionError` if a name fits no layer: PEFT accepts several names if one of them fits."""
    layers = dict(model.named_modules())
    for field, source in NAMES_OF_LAYERS.items():
        names = getattr(config, field, None)
        several = sorted(names) if names and not isinstance(names, str) else []
        missing = [
            one for one in several if not any(name == one or name.endswith(f".{one}") for name in layers)
        ]
        if missing:
            linear = {
                name.rpartition(".")[2]
                for name, module in layers.items()
                if isinstance(module, (torch.nn.Linear, Conv1D))
            }
            raise OptionError(
                f"{type(model).__name__} has no layer called {' or '.join(missing)} ({source}).\n"
                f"Its linear layers: {', '.join(sorted(linear))}."
            )


def check_suited(config: PeftConfig) -> None:
    kind = kind_of(config)
    for field, reason in UNSUITED_FIELDS.items():
        if getattr(config, field, None):
            raise OptionError(
                f"an adapter with {field} is not supported: {reason}.\nTake it out of the adapter's config."
            )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise OptionError(
            f"task_type {config.task_type}: the policy is a causal language model.\n"
            "Write CAUSAL_LM into the adapter's config."
        )
    start = getattr(config, "init_lora_weights", True)
    if start not in PLAIN_STARTS:
        reason = (
            "such an adapter starts from data or from the weights under it, which needs a step of its own"
            if str(start).lower() in ("eva", "mica")
            else "such an adapter changes the weights under it, so that they are no longer the reference's"
        )
        raise OptionError(f"init_lora_weights {start!r}: {reason}.\nUse true or gaussian.")
    if config.is_prompt_learning or kind in UNSUITED:
        raise OptionError(
            f"adapters of the kind {kind} are not supported: they are not part of the layers, or need a call "
            "for each step.\nUse LoRA."
        )


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "peft":
            raise OptionError("adapters need the package peft.\nRun `pip install peft`.") from error
        raise OptionError(
            f"peft is installed, but importing it failed: {first_line(error)}\n"
            "Run `pip install --upgrade peft accelerate transformers`, so that their versions fit."
        ) from error
    return peft
