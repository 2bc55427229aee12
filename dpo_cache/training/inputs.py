"""What a run trains on and what it trains, found and checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as call_once
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import DpoCacheError, ModelError, TrainingError
from dpo_cache.lm.kernels.onednn_linear import CLEAR_SPEEDUP
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.adapter import (
    CheckpointLocation,
    add_adapter,
    can_be_switched_off,
    check_mergeable,
    is_identity_at_init,
    load_adapter,
    locate_checkpoint,
    lora_config,
    read_adapter_config,
)
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_base, load_config
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.log import Log
from dpo_cache.options.losses import LossOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.format.checks import check_details
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.training.batches import held_out
from dpo_cache.training.loaded import LoadedPolicy, check_options, with_template

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs to train and to evaluate on; the selections are bool, one entry a pair of their set."""

    pairs: PairSet
    selected: np.ndarray
    eval_pairs: PairSet | None
    eval_selected: np.ndarray
    reference: Document

    @property
    def num_pairs(self) -> int:
        return int(self.selected.sum())


@dataclass(frozen=True)
class TrainedModel:
    """The model to train, how it is run, and what is saved with it."""

    model: PreTrainedModel
    location: str
    tokenizer: PreTrainedTokenizerBase
    attention: AttentionChoice
    precision: str
    linear: str  # the library that multiplies: "torch" or "onednn"
    recomputation: Recomputation
    # it starts as the very model that scored the pairs; never known of an imported reference
    is_reference: bool
    differing: tuple[str, ...] = ()  # fields of their identities, where it starts as another model
    adapted: PeftModel | None = None  # saves, switches off and merges the adapter inside the model
    remarks: tuple[str, ...] = ()  # other differences between it and what the pairs were made with
    base_is_reference: bool = False  # with its adapter switched off, it is the model that scored the pairs
    base_weights: str | None = None  # digest of the frozen weights under its adapter


def open_pairs(options: TrainOptions, cache: Cache) -> TrainingPairs:
    """The pair sets that the options name, all scored by one reference, and held: what becomes of them in the
    cache changes nothing here.

    Raises `CacheError` or `TrainingError`.
    """
    eval_pairs = cache.pairs(options.eval_pairs) if options.eval_pairs else None
    pairs = cache.choose_pairs(
        options.pairs, "to train on", besides=None if eval_pairs is None else eval_pairs.name
    )
    check_details(pairs.manifest, f"{cache}/pairs/{pairs.name}/manifest.json")
    pairs.keep_open()
    check_token_logps(options, pairs, TrainingError)
    reference_id = pairs.reference_id
    if options.reference:
        cache.check_scored_by(pairs, options.reference)
    selected = np.ones(len(pairs), bool)
    eval_selected = np.zeros(0, bool)
    if eval_pairs is not None:
        eval_pairs.keep_open()
        check_token_logps(options, eval_pairs, TrainingError)
        eval_selected = np.ones(len(eval_pairs), bool)
        if eval_pairs.reference_id != reference_id:
            raise TrainingError(
                f"{eval_pairs.name} was scored by reference {eval_pairs.reference_id[:12]}, {pairs.name} "
                f"by {reference_id[:12]}.\n"
                "Run `dpo-cache precompute` on the evaluation data with the same model, dtype and cache."
            )
    elif options.eval_fraction:
        eval_pairs, eval_selected = pairs, held_out(pairs, options.eval_fraction, options.seed)
        selected = ~eval_selected
        if not selected.any() or not eval_selected.any():
            raise TrainingError(
                f"`eval_fraction` {options.eval_fraction} leaves one side without pairs (of "
                f"{len(pairs)}).\nTry another fraction."
            )
    return TrainingPairs(pairs, selected, eval_pairs, eval_selected, cache.read_reference(reference_id))


@contextmanager
def open_policy(
    options: TrainOptions,
    data: TrainingPairs,
    device: torch.device,
    checkpoint: Path | None,
    *,
    is_onednn: bool | None,
    log: Log,
    loaded: LoadedPolicy | None = None,
) -> Iterator[TrainedModel]:
    """Load the policy, or take a `loaded` one, with its weights at the start or at the checkpoint; it is
    prepared until the block ends.

    `is_onednn` decides which library multiplies, see `prepared`. Raises `ModelError`, `TrainingError` or
    `OptionError`.
    """
    made_with, identity = data.pairs.manifest["tokenization"], data.reference["identity"]
    location, revision = _start_of(options, data)
    if (
        checkpoint is None
        and options.model is None
        and os.path.isabs(location)
        and not os.path.isdir(location)
    ):
        raise ModelError(
            f"the reference's checkpoint {location} is gone.\nSay where the policy starts from with `model`."
        )
    # a checkpoint holds all that is needed, but for an adapter's base: where a whole policy started from may
    # be gone
    if loaded is None:
        parts = locate_checkpoint(str(checkpoint)) if checkpoint else locate_checkpoint(location, revision)
    else:
        check_options(options)
        parts = loaded.location(checkpoint, is_adapted=_adds_adapter(options))
    is_adapted = _check_adapter(options, parts, location, is_resumed=checkpoint is not None)
    if loaded is not None and loaded.tokenizer is not None:
        tokenizer = with_template(loaded.tokenizer, made_with)
    else:
        places = [str(checkpoint)] if checkpoint else [made_with["tokenizer"], location, parts.base]
        tokenizer = _load_tokenizer(places, made_with, options.trust_remote_code)
    precision = _choose_precision(options.precision, device)
    is_imported = "imported" in identity  # it has no weights to compare with: step zero tells
    dtype = (
        torch.bfloat16 if precision == "bf16" or (precision == "bf16-mixed" and is_adapted) else torch.float32
    )

    @call_once
    def identify(location: str, revision: str | None) -> Document:
        if loaded is not None:
            return loaded.identify(dtype, trust_remote_code=options.trust_remote_code)
        return _identity_of(location, revision, options)

    differing = [] if checkpoint or is_imported else _compare(identity, identify(location, revision))
    base = identify(parts.base, parts.base_revision) if is_adapted else None
    if loaded is not None:
        model = loaded.place(dtype, device, None if is_adapted else checkpoint)
    else:
        model = load_base(
            parts,
            dtype=dtype,
            device=device,
            trust_remote_code=options.trust_remote_code,
            quantize=options.quantize,
            compute_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        )
    adapted = _adapt(options, model, parts) if is_adapted else None
    if adapted is not None and options.merge_adapter:
        check_mergeable(adapted)
    base_is_reference = base is not None and not is_imported and not _compare(identity, base)
    remarks = () if checkpoint else (*_template_remarks(options, made_with), *_start_remarks(adapted, parts))
    with (
        in_eval_mode(model),
        prepared(
            model,
            trains=True,
            offloads=options.offload_activations,
            min_speedup=CLEAR_SPEEDUP,
            is_onednn=is_onednn,
            log=log,
        ) as run,
    ):
        assert run.recomputation is not None
        yield TrainedModel(
            model=model,
            location=location,
            tokenizer=tokenizer,
            attention=choose_attention(model, "auto", max_length=made_with["max_length"]),
            precision=precision,
            linear=run.linear,
            recomputation=run.recomputation,
            is_reference=checkpoint is None and not is_imported and not differing,
            differing=tuple(differing),
            adapted=adapted,
            remarks=remarks,
            base_is_reference=base_is_reference and can_be_switched_off(adapted),
            base_weights=None if base is None else base["weights"],
        )


def _start_of(options: TrainOptions, data: TrainingPairs) -> tuple[str, str | None]:
    """Location and revision of the model that the policy starts from."""
    source = data.reference["provenance"]
    if options.model is not None:
        return options.model, None
    if source["model"] is None:
        imported = data.reference["identity"].get("imported")
        problem = (
            f"the reference {imported!r} was imported without a checkpoint"
            if imported
            else "the reference was a model in memory, not a checkpoint"
        )
        raise ModelError(f"{problem}.\nSay where the policy starts from with `model`.")
    return source["model"], source.get("revision")


def _check_adapter(
    options: TrainOptions, parts: CheckpointLocation, location: str, *, is_resumed: bool
) -> bool:
    """Whether an adapter is trained. Raises `TrainingError` for options that need one, or that would put one
    on another.
    """
    is_new = _adds_adapter(options)
    is_own = parts.adapter is not None
    if is_new and is_own and not is_resumed:
        raise TrainingError(
            f"{location} is an adapter already, which would be trained on.\n"
            "Leave `lora_r` and `peft_config` out, or merge it into its base first (peft: "
            "`merge_and_unload`)."
        )
    for flag, is_given in (
        ("`merge_adapter`", options.merge_adapter),
        (f"`quantize` {options.quantize}", options.quantize != "none"),
    ):
        if is_given and not (is_new or is_own):
            raise TrainingError(
                f"{flag} needs an adapter, and all weights of {location} would be trained.\n"
                "Add `lora_r` 16, for example."
            )
    return is_new or is_own


def _adds_adapter(options: TrainOptions) -> bool:
    return options.lora_r is not None or options.peft_config is not None


def _adapt(options: TrainOptions, model: PreTrainedModel, parts: CheckpointLocation) -> PeftModel:
    """The model's adapter: the one that lies beside the base, or a fresh one."""
    if parts.adapter is not None:
        return load_adapter(model, parts.adapter, is_trainable=True)
    if options.lora_r is not None:
        config = lora_config(options.lora_r, options.lora_alpha, options.lora_targets)
    else:
        config = read_adapter_config(str(options.peft_config))
    config.revision = parts.base_revision
    return add_adapter(model, config, seed=options.seed)


def _template_remarks(options: TrainOptions, made_with: Document) -> list[str]:
    """Whether the model that was named has another chat template than the one that the pairs were made
    with.
    """
    if options.model is None or made_with["tokenizer"] is None:
        return []
    try:
        own = AutoTokenizer.from_pretrained(
            options.model, trust_remote_code=options.trust_remote_code
        ).chat_template
    except (OSError, ValueError):
        return []
    if own is None or own == made_with["chat_template"]:
        return []
    return [
        f"template (the chat template of {options.model} is another than the one that the pairs were made "
        "with)"
    ]


def _start_remarks(adapted: PeftModel | None, parts: CheckpointLocation) -> list[str]:
    """Whether a fresh adapter is of a kind that may change the model from the start."""
    if adapted is None or parts.adapter is not None or is_identity_at_init(adapted):
        return []
    return [
        "adapter (a fresh adapter of its kind need not start at nothing: see the initial values in its "
        "config)"
    ]


def _identity_of(location: str, revision: str | None, options: TrainOptions) -> Document:
    config = load_config(location, revision=revision, trust_remote_code=options.trust_remote_code)
    return reference_identity(location, config, torch.float32, revision=revision, quantize=options.quantize)


def _compare(reference: Document, policy: Document) -> list[str]:
    """What differs between two identities; not their dtypes, for the policy's is its own."""
    return differing_fields(reference, {**policy, "dtype": reference["dtype"]})


def check_token_logps(options: LossOptions, pairs: PairSet, error: type[DpoCacheError]) -> None:
    """Raise the error where a loss needs the reference's token log-probs, and the pairs have only sums.

    Only an import makes such pairs.
    """
    if options.ld_alpha is not None and options.ld_reference and not pairs.has_token_logps:
        raise error(
            f"{pairs.name} holds only sums of log-probs, and `ld_alpha` weights the reference's tokens, "
            "too.\n"
            "Use `ld_reference=False`, or score the pairs with `dpo-cache precompute`."
        )


def _load_tokenizer(
    locations: list[str | None], made_with: Document, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer that made the ids, with its template, to be saved beside the model; of imported ids, the
    policy's own.
    """
    known = [location for location in locations if location is not None]
    for location in known:
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            continue
        if made_with["tokenizer"] is not None:
            tokenizer.chat_template = made_with["chat_template"]
        return tokenizer
    raise ModelError(
        f"no tokenizer in {' or '.join(known)}; the trained model would be saved without one.\n"
        "Put its files there."
    )


def _choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
