"""Open what an evaluation needs: the pair set, and the policy, compared with the reference that scored it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import ModelError, NotInCacheError
from dpo_cache.lm.device import choose_device, choose_dtype
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import check_causal, load_config
from dpo_cache.log import Log
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.losses import LossOptions
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.format.checks import check_details
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.tokenizer import load_tokenizer, tokenizer_digest


@dataclass(frozen=True)
class EvaluatedModel:
    """How the model that is evaluated is loaded, and how it differs from the reference."""

    dtype: torch.dtype
    device: torch.device
    # the very model that scored the pairs, in whatever dtype; never known of an imported reference
    is_reference: bool
    differing: tuple[str, ...]  # fields of their identities, if it is another model

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def open_pairs(cache: Cache, name: str | None, reference: str | None) -> PairSet:
    """The pair set of that name, or the only one, with its files kept open. Raises `CacheError`."""
    pairs = cache.choose_pairs(name, "to evaluate on")
    check_details(pairs.manifest, f"{cache}/pairs/{pairs.name}/manifest.json")
    if not len(pairs):
        raise NotInCacheError(f"{cache}: pair set {pairs.name} holds no pairs.")
    pairs.keep_open()
    if reference:
        cache.check_scored_by(pairs, reference)
    return pairs


def check_token_logps(options: LossOptions, pairs: PairSet) -> None:
    """Raise `NotInCacheError` where a loss needs the reference's log-prob of each token, and the pairs
    have only sums.
    """
    if options.ld_alpha is not None and options.ld_reference and not pairs.has_token_logps:
        raise NotInCacheError(
            f"{pairs.name} holds only sums of log-probs, and `ld_alpha` weights the reference's tokens, "
            "too.\n"
            "Use `ld_reference=False`, or score the pairs with `dpo-cache precompute`."
        )


def identify_policy(options: EvalOptions, pairs: PairSet, reference: Document, log: Log) -> EvaluatedModel:
    """Compare the policy with the reference by its files, before it is loaded. Raises `ModelError`.

    Only the policy's log-probs are computed: those of the reference are read from the cache.
    """
    location, trust = options.model, options.trust_remote_code
    _check_no_run(Path(location))
    config = load_config(location, revision=options.revision, trust_remote_code=trust)
    check_causal(config, location)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device, getattr(config, "dtype", None))
    identity = reference["identity"]
    live = reference_identity(location, config, dtype, revision=options.revision)
    is_imported = "imported" in identity  # it has no weights to compare with
    differing = () if is_imported else tuple(differing_fields(identity, {**live, "dtype": identity["dtype"]}))
    _compare_tokenizers(options, pairs.manifest["tokenization"], log)
    return EvaluatedModel(dtype, device, not is_imported and not differing, differing)


def check_room(config: PreTrainedConfig, location: str, largest_id: int, longest: int, row: int) -> None:
    """Raise `ModelError` for a pair with ids or a length that the model has no embeddings for."""
    text_config = config.get_text_config()
    if largest_id >= text_config.vocab_size:
        raise ModelError(
            f"row {row} holds token id {largest_id}, but {location} has {text_config.vocab_size} "
            "embeddings: it reads other tokens.\n"
            "Give a model with the tokenizer of the pairs, or score the data with `dpo-cache precompute` "
            "for this one."
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise ModelError(
            f"row {row} has a sequence of {longest} tokens, but {location} was made for {positions} at "
            "most.\n"
            f"Score the data with `dpo-cache precompute --max-length {positions}` and evaluate on that."
        )


def _check_no_run(folder: Path) -> None:
    """Raise `ModelError` for the folder of a training run, whose config.json is not a model's."""
    if not (folder / "metrics.jsonl").is_file():
        return
    place = (
        f"Give {folder / 'model'}."
        if (folder / "model").is_dir()
        else "It has no model yet: finish it with `dpo-cache train --resume`."
    )
    raise ModelError(f"{folder}: the folder of a training run, not of a model.\n{place}")


def _compare_tokenizers(options: EvalOptions, made_with: Document, log: Log) -> None:
    """Log a remark if the policy's own tokenizer is not the one that made the ids.

    That needs a recorded digest, and a tokenizer in the policy's folder.
    """
    expected = made_with.get("tokenizer_sha256")
    if not expected:
        return
    try:
        own = load_tokenizer(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except ModelError:
        log(
            f"{options.model} has no tokenizer to compare with the one that made the pairs' ids; they are "
            "taken to be the same."
        )
        return
    if tokenizer_digest(own) != expected:
        log(
            f"the tokenizer of {options.model} is not the one that made the pairs' ids "
            f"({made_with['tokenizer']}): another vocabulary, other "
            "rules, special tokens or another chat template. If its ids mean other tokens, nothing below "
            "has a meaning."
        )
