"""The pairs and the policy of a run, opened and checked before anything is written."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache as call_once
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import DpoCacheError, ModelError, TrainingError
from dpo_cache.lm.check_logps import FOREST
from dpo_cache.lm.kernels.onednn_linear import CLEAR_SPEEDUP
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.adapter import (
    CheckpointLocation,
    add_adapter,
    can_be_switched_off,
    check_mergeable,
    is_identity_at_init,
    locate_checkpoint,
    lora_config,
    read_adapter_config,
)
from dpo_cache.lm.model.adapter_weights import load_adapter
from dpo_cache.lm.model.identity import identity_as_recorded, reference_identity
from dpo_cache.lm.model.load import load_base, load_config
from dpo_cache.lm.policy import default_micro_tokens
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.log import Log
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.losses import LossOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.format.checks import check_details
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.training.batches import held_out
from dpo_cache.training.lengths import measure_rows
from dpo_cache.training.loaded import LoadedPolicy, adds_adapter

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
class Origin:
    """How the model that a run starts from compares with the one that scored the pairs, by their identities.

    An imported reference has no weights to compare with; step zero compares the log-probs.
    """

    is_reference: bool  # both are known to be one model
    differing: tuple[str, ...]  # fields of their identities, otherwise
    base_is_reference: bool  # the same of the base under an adapter
    base_weights: str | None  # digest of the base's weights
    is_named: bool = False  # the model is the one that `import` named as that of the imported log-probs


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
    origin: Origin
    adapted: PeftModel | None  # saves, switches off and merges the adapter inside the model
    remarks: tuple[str, ...]  # differences from the model that made the pairs, besides `origin.differing`

    @property
    def base_is_reference(self) -> bool:
        """Whether the policy with its adapter switched off is known to be the model that scored the pairs."""
        return self.origin.base_is_reference and can_be_switched_off(self.adapted)


def open_pairs(options: TrainOptions, cache: Cache) -> TrainingPairs:
    """The pair sets that the options name, all scored by one reference.

    Their files are kept open, so later changes of the cache have no effect. Raises `CacheError` or
    `TrainingError`.
    """
    eval_pairs = cache.pairs(options.eval_pairs) if options.eval_pairs else None
    pairs = cache.choose_pairs(
        options.pairs, "to train on", besides=None if eval_pairs is None else eval_pairs.name
    )
    check_details(pairs.manifest, f"{cache}/pairs/{pairs.name}/manifest.json")
    pairs.keep_open()
    check_token_logps(options, pairs, TrainingError)
    if options.reference:
        cache.check_scored_by(pairs, options.reference)
    selected, eval_selected = np.ones(len(pairs), bool), np.zeros(0, bool)
    if eval_pairs is not None:
        eval_pairs.keep_open()
        check_token_logps(options, eval_pairs, TrainingError)
        eval_selected = np.ones(len(eval_pairs), bool)
        if eval_pairs.reference_id != pairs.reference_id:
            raise TrainingError(
                f"{eval_pairs.name} was scored by reference {eval_pairs.reference_id[:12]}, {pairs.name} "
                f"by {pairs.reference_id[:12]}.\n"
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
    return TrainingPairs(pairs, selected, eval_pairs, eval_selected, cache.read_reference(pairs.reference_id))


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
    """Load the policy, or take a `loaded` one, with its weights at the start or at the checkpoint.

    It is prepared until the block ends; `is_onednn` decides which library multiplies, see `prepared`. Raises
    `ModelError`, `TrainingError` or `OptionError`.
    """
    made_with = data.pairs.manifest["tokenization"]
    location, revision = _start_of(options, data, is_resumed=checkpoint is not None)
    if loaded is not None:
        parts = loaded.locate(options, checkpoint)
    elif checkpoint is not None:  # which has everything but an adapter's base
        parts = locate_checkpoint(str(checkpoint))
    else:
        parts = locate_checkpoint(location, revision)
    is_adapted = _check_adapter(options, parts, location, is_resumed=checkpoint is not None)
    places = [str(checkpoint)] if checkpoint else [made_with["tokenizer"], location, parts.base]
    tokenizer = _choose_tokenizer(loaded, places, made_with, options.trust_remote_code)
    precision = _choose_precision(options.precision, device)
    is_bf16 = precision == "bf16" or (precision == "bf16-mixed" and is_adapted)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    start = None if checkpoint else (location, revision)
    base = (parts.base, parts.base_revision) if is_adapted else None
    origin = _compare_origin(options, data, start, base, dtype, loaded)
    if loaded is not None:
        model = loaded.place(dtype, device, None if is_adapted else checkpoint)
    else:
        model = _load_model(options, parts, precision, dtype, device)
    adapted = _adapt(options, model, parts, log) if is_adapted else None
    offloads = options.offload_activations
    with (
        in_eval_mode(model),
        prepared(
            model, trains=True, offloads=offloads, min_speedup=CLEAR_SPEEDUP, is_onednn=is_onednn, log=log
        ) as run,
    ):
        assert run.recomputation is not None
        yield TrainedModel(
            model=model,
            location=location,
            tokenizer=tokenizer,
            attention=_choose_attention(options, data, model),
            precision=precision,
            linear=run.linear,
            recomputation=run.recomputation,
            origin=origin,
            adapted=adapted,
            remarks=() if checkpoint else _find_remarks(options, made_with, adapted, parts),
        )


def _choose_attention(options: TrainOptions, data: TrainingPairs, model: PreTrainedModel) -> AttentionChoice:
    """How the model is run over the rows of both pair sets, in forests as large as the run's."""
    pair_sets = [data.pairs]
    if data.eval_pairs is not None and data.eval_pairs is not data.pairs:
        pair_sets.append(data.eval_pairs)
    rows = measure_rows(pair_sets, model.config)
    budget = number_or_auto("budget_tokens", options.budget_tokens)
    num_pairs = options.epochs * data.num_pairs
    if options.max_steps is not None:
        num_pairs = min(num_pairs, options.max_steps * options.batch_size)
    return choose_attention(
        model,
        max_length=rows.longest,
        chunk_tokens=max(budget, rows.longest)
        if budget
        else max(default_micro_tokens(model.device), 2 * rows.longest),  # a pair is not split
        run_tokens=int(rows.pair_tokens * num_pairs),
        ways=(FOREST,),
    )


def _load_model(
    options: TrainOptions, parts: CheckpointLocation, precision: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    return load_base(
        parts,
        dtype=dtype,
        device=device,
        trust_remote_code=options.trust_remote_code,
        quantize=options.quantize,
        compute_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
    )


def _compare_origin(
    options: TrainOptions,
    data: TrainingPairs,
    start: tuple[str, str | None] | None,
    base: tuple[str, str | None] | None,
    dtype: torch.dtype,
    loaded: LoadedPolicy | None,
) -> Origin:
    """Compare the model at `start` and the `base` of an adapter, each a location and revision, with the
    reference.
    """
    reference = data.reference["identity"]
    is_imported = "imported" in reference

    @call_once
    def identify(location: str, revision: str | None, scored_in: torch.dtype) -> Document:
        trusted = options.trust_remote_code
        if loaded is not None:
            return loaded.identify(dtype, reference, scored_in, trust_remote_code=trusted)
        config = load_config(location, revision=revision, trust_remote_code=trusted)
        return identity_as_recorded(
            reference,
            location,
            config,
            scored_in,
            revision=revision,
            quantize=options.quantize,
            trust_remote_code=trusted,
        )

    def compare(model: tuple[str, str | None]) -> tuple[str, ...]:  # the dtype is a choice of the run
        live = identify(*model, getattr(torch, reference["dtype"]))
        return tuple(differing_fields(reference, {**live, "dtype": reference["dtype"]}))

    differing = compare(start) if start and not is_imported else ()
    return Origin(
        is_reference=start is not None and not is_imported and not differing,
        differing=differing,
        base_is_reference=base is not None and not is_imported and not compare(base),
        base_weights=identify(*base, torch.float32)["weights"] if base else None,
        is_named=is_imported and start is not None and _is_named(options, data, start, dtype, loaded),
    )


def _is_named(
    options: TrainOptions,
    data: TrainingPairs,
    start: tuple[str, str | None],
    dtype: torch.dtype,
    loaded: LoadedPolicy | None,
) -> bool:
    """Whether the model at the start is the one that `import --model` named: the same place, or the same
    identity.
    """
    source, trusted = data.reference["provenance"], options.trust_remote_code
    named = source.get("model"), source.get("revision")
    if named[0] is None or options.quantize != "none":
        return False
    if loaded is None and start == named:
        return True
    if not os.path.isdir(named[0]):
        return False

    def identify(location: str, revision: str | None) -> Document:
        config = load_config(location, revision=revision, trust_remote_code=trusted)
        return reference_identity(
            location, config, torch.float32, revision=revision, trust_remote_code=trusted
        )

    expected = identify(*named)
    if loaded is not None:
        return loaded.identify(dtype, expected, torch.float32, trust_remote_code=trusted) == expected
    return identify(*start) == expected


def _start_of(options: TrainOptions, data: TrainingPairs, *, is_resumed: bool) -> tuple[str, str | None]:
    """Location and revision of the model that the policy starts from."""
    if options.model is not None:
        return options.model, None
    source = data.reference["provenance"]
    location = source["model"]
    if location is None:
        imported = data.reference["identity"].get("imported")
        problem = (
            f"the reference {imported!r} was imported without a checkpoint"
            if imported
            else "the reference was a model in memory, not a checkpoint"
        )
        raise ModelError(f"{problem}.\nName the model that the policy starts from with `model`.")
    if not is_resumed and os.path.isabs(location) and not os.path.isdir(location):
        raise ModelError(
            f"the reference's checkpoint {location} is gone.\n"
            "Name the model that the policy starts from with `model`."
        )
    return location, source.get("revision")


def _check_adapter(
    options: TrainOptions, parts: CheckpointLocation, location: str, *, is_resumed: bool
) -> bool:
    """Whether an adapter is trained. Raises `TrainingError` for options that need one or add a second one."""
    is_new, is_saved = adds_adapter(options), parts.adapter is not None
    if is_new and is_saved and not is_resumed:
        raise TrainingError(
            f"{location} is an adapter already, which would be trained on.\n"
            "Leave `lora_r` and `peft_config` out, or merge it into its base first (peft: "
            "`merge_and_unload`)."
        )
    for flag, is_given in (
        ("`merge_adapter`", options.merge_adapter),
        (f"`quantize` {options.quantize}", options.quantize != "none"),
    ):
        if is_given and not (is_new or is_saved):
            raise TrainingError(
                f"{flag} needs an adapter, and all weights of {location} would be trained.\n"
                "Add `lora_r` 16, for example."
            )
    return is_new or is_saved


def _adapt(options: TrainOptions, model: PreTrainedModel, parts: CheckpointLocation, log: Log) -> PeftModel:
    """Put the saved adapter into the model, or a fresh one."""
    if parts.adapter is not None:
        adapted = load_adapter(model, parts.adapter, is_trainable=True)
    else:
        if options.lora_r is not None:
            config = lora_config(options.lora_r, options.lora_alpha, options.lora_targets)
        else:
            config = read_adapter_config(str(options.peft_config))
        config.revision = parts.base_revision
        adapted = add_adapter(model, config, seed=options.seed, log=log)
    if options.merge_adapter:
        check_mergeable(adapted)
    return adapted


def _find_remarks(
    options: TrainOptions, made_with: Document, adapted: PeftModel | None, parts: CheckpointLocation
) -> tuple[str, ...]:
    """Differences that `Origin` does not cover: of a named model's chat template, and of a fresh adapter."""
    remarks, template = [], None
    if options.model is not None and made_with["tokenizer"] is not None:
        with suppress(OSError, ValueError):
            template = AutoTokenizer.from_pretrained(
                options.model, trust_remote_code=options.trust_remote_code
            ).chat_template
    if template is not None and template != made_with["chat_template"]:
        remarks.append(
            f"template (the chat template of {options.model} is not the one that the pairs were made with)"
        )
    if adapted is not None and parts.adapter is None and not is_identity_at_init(adapted):
        remarks.append(
            "adapter (a fresh adapter of its kind may change the model: see the initial values in its config)"
        )
    return tuple(remarks)


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


def _choose_tokenizer(
    loaded: LoadedPolicy | None,
    locations: list[str | None],
    made_with: Document,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase:
    """The tokenizer to save with the model: a copy of the given one, or the first that a location has.

    Its template is the one that the pairs were made with, unless their token ids were imported.
    """
    known = [location for location in locations if location is not None]
    tokenizer = copy.deepcopy(loaded.tokenizer) if loaded is not None else None
    for location in known if tokenizer is None else ():
        with suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
            break
    if tokenizer is None:
        raise ModelError(
            f"no tokenizer in {' or '.join(known)}; the trained model would be saved without one.\n"
            "Put its files there."
        )
    if made_with["tokenizer"] is not None:
        tokenizer.chat_template = made_with["chat_template"]
    return tokenizer


def _choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
