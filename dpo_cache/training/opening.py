"""What a run trains on and what it trains, found and checked before anything is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import ModelError, NotInCacheError, TrainingError
from dpo_cache.lm.engine import Attention, choose_attention
from dpo_cache.lm.identity import reference_identity
from dpo_cache.lm.load import load_config, load_model
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.checks import check_details
from dpo_cache.store.documents import Document
from dpo_cache.store.identities import differing_fields
from dpo_cache.train_options import TrainOptions
from dpo_cache.training.batches import held_out


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
class Policy:
    """The model to train, how it is run, and what is saved with it."""

    model: PreTrainedModel
    location: str
    tokenizer: PreTrainedTokenizerBase
    attention: Attention
    precision: str
    is_reference: bool  # it starts as the very model that scored the pairs; never known of an imported reference
    differing: tuple[str, ...] = ()  # fields of their identities, where it starts as another model


def open_pairs(options: TrainOptions, cache: Cache) -> TrainingPairs:
    """The pair sets that the options name, all scored by one reference, and held: what becomes of them in the cache changes nothing here.

    Raises `CacheError` or `TrainingError`.
    """
    pairs = cache.pairs(options.pairs) if options.pairs else _only_pair_set(cache, options.eval_pairs)
    check_details(pairs.manifest, f"{cache}/pairs/{pairs.name}/manifest.json")
    pairs.hold()
    _check_token_logps(options, pairs)
    reference_id = pairs.reference_id
    if options.reference and (expected := cache.find_reference(options.reference)) != reference_id:
        identities = [cache.read_reference(entry)["identity"] for entry in (reference_id, expected)]
        raise TrainingError(
            f"pair set {pairs.name} was scored by reference {reference_id[:12]}, not by {options.reference}; they differ in\n"
            + "".join(f"  {line}\n" for line in differing_fields(*identities))
            + "Leave --reference out, or run `dpo-cache precompute` with that model and another --name."
        )
    selected = np.ones(len(pairs), bool)
    eval_pairs, eval_selected = None, np.zeros(0, bool)
    if options.eval_pairs:
        eval_pairs = cache.pairs(options.eval_pairs)
        eval_pairs.hold()
        _check_token_logps(options, eval_pairs)
        eval_selected = np.ones(len(eval_pairs), bool)
        if eval_pairs.reference_id != reference_id:
            raise TrainingError(
                f"{eval_pairs.name} was scored by reference {eval_pairs.reference_id[:12]}, {pairs.name} by {reference_id[:12]}.\n"
                "Run `dpo-cache precompute` on the evaluation data with the same model, dtype and cache."
            )
    elif options.eval_fraction:
        eval_pairs, eval_selected = pairs, held_out(pairs, options.eval_fraction, options.seed)
        selected = ~eval_selected
        if not selected.any() or not eval_selected.any():
            raise TrainingError(f"--eval-fraction {options.eval_fraction} leaves one side without pairs (of {len(pairs)}).\nTry another fraction.")
    return TrainingPairs(pairs, selected, eval_pairs, eval_selected, cache.read_reference(reference_id))


def open_policy(options: TrainOptions, data: TrainingPairs, device: torch.device, checkpoint: Path | None) -> Policy:
    """The policy with its weights at the start, or at the checkpoint. Raises `ModelError`."""
    source, made_with = data.reference["provenance"], data.pairs.manifest["tokenization"]
    location, trust = options.model or source["model"], options.trust_remote_code
    revision = None if options.model else source.get("revision")
    differing: tuple[str, ...] = ()
    if location is None:
        imported = data.reference["identity"]["imported"]
        raise ModelError(f"the reference {imported!r} was imported without a checkpoint.\nSay where the policy starts from with --model.")
    if checkpoint:  # it holds all that is needed: where the policy started from may be gone
        is_reference, tokenizer = False, _load_tokenizer([str(checkpoint)], made_with, trust)
    else:
        if options.model is None and os.path.isabs(location) and not os.path.isdir(location):
            raise ModelError(f"the reference's checkpoint {location} is gone.\nSay where the policy starts from with --model.")
        tokenizer = _load_tokenizer([made_with["tokenizer"], location], made_with, trust)
        identity, config = data.reference["identity"], load_config(location, revision=revision, trust_remote_code=trust)
        live = reference_identity(location, config, torch.float32, revision=revision)
        is_imported = "imported" in identity  # it has no weights to compare with: step zero tells
        differing = () if is_imported else tuple(differing_fields(identity, {**live, "dtype": identity["dtype"]}))  # dtype: the policy's is its own
        is_reference = not is_imported and not differing
    precision = _choose_precision(options.precision, device)
    model = load_model(
        str(checkpoint or location),
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        device=device,
        revision=None if checkpoint else revision,
        trust_remote_code=trust,
    )
    attention = choose_attention(model, "auto", max_length=made_with["max_length"])
    return Policy(model, location, tokenizer, attention, precision, is_reference, differing)


def _check_token_logps(options: TrainOptions, pairs: PairSet) -> None:
    """Raise `TrainingError` where a loss needs the reference's log-prob of each token, and an import brought sums alone."""
    if options.ld_alpha is not None and options.ld_reference and not pairs.has_token_logps:
        raise TrainingError(
            f"{pairs.name} holds sums of log-probs alone, and --ld-alpha weights the reference's tokens, too.\n"
            "Use --no-ld-reference, or score the pairs with `dpo-cache precompute`."
        )


def _only_pair_set(cache: Cache, eval_pairs: str | None) -> PairSet:
    held = cache.pairs(eval_pairs).name if eval_pairs else None
    known = [name for name in cache.pair_sets() if name != held]
    if len(known) == 1:
        return cache.pairs(known[0])
    if held and not known:
        raise NotInCacheError(f"{cache}: no pair set to train on besides {held}, which is to be evaluated on.\nName one with --pairs.")
    if not known:
        raise NotInCacheError(f"{cache}: no pair set to train on.\nRun `dpo-cache precompute --cache {cache} …` first.")
    raise NotInCacheError(f"{cache}: several pair sets to train on.\nSay which with --pairs: {', '.join(known)}.")


def _load_tokenizer(locations: list[str | None], made_with: Document, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that made the ids, with its template, to be saved beside the model; of imported ids, the policy's own."""
    known = [location for location in locations if location is not None]
    for location in known:
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            continue
        if made_with["tokenizer"] is not None:
            tokenizer.chat_template = made_with["chat_template"]
        return tokenizer
    raise ModelError(f"no tokenizer in {' or '.join(known)}; the trained model would be saved without one.\nPut its files there.")


def _choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
