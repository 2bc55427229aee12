"""Opens the inputs of an evaluation: the pair set, and the policy, compared with the pair set's reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_cache.errors import ModelError, NotInCacheError, printable
from dpo_cache.files.locations import check_revision
from dpo_cache.lm.device import choose_device, choose_dtype
from dpo_cache.lm.model.architecture import check_causal
from dpo_cache.lm.model.identity import identity_as_recorded
from dpo_cache.lm.model.load import load_config
from dpo_cache.log import Log
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.format.checks import check_details, check_identity
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.tokenizer import load_tokenizer, tokenizer_digest
from dpo_cache.training.inputs import check_token_logps


@dataclass(frozen=True)
class EvaluatedModel:
    """The evaluated model: the way to load it, and its differences from the reference."""

    dtype: torch.dtype
    device: torch.device
    # True for the model that scored the pairs, in any dtype; unknown for an imported reference
    is_reference: bool
    differing: tuple[str, ...]  # if it is another model, the fields in which their identities differ
    saved_dtype: str | None = None  # of its weights in the checkpoint

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def rounding_dtypes(self) -> tuple[str, ...]:
        """The dtypes whose rounding is in its rewards. Weights that training has rounded, to bfloat16 for
        example, differ from the reference's by that, in whatever dtype they are evaluated.
        """
        has_own_weights = any(line.startswith("weights:") for line in self.differing)
        if has_own_weights and self.saved_dtype in ("bfloat16", "float16"):
            return (self.dtype_name, self.saved_dtype)
        return (self.dtype_name,)


def open_pairs(cache: Cache, options: EvalOptions) -> PairSet:
    """The pair set that the options name, or the only one. Its files are kept open. Raises `CacheError`."""
    pairs = cache.choose_pairs(options.pairs, "to evaluate on")
    check_details(pairs.manifest, f"{cache}/pairs/{pairs.name}/manifest.json")
    if not len(pairs):
        raise NotInCacheError(f"{cache}: pair set {pairs.name} holds no pairs.")
    pairs.keep_open()
    if options.reference:
        cache.check_scored_by(pairs, options.reference)
    check_token_logps(options, pairs, NotInCacheError)
    return pairs


def identify_policy(options: EvalOptions, pairs: PairSet, reference: Document, log: Log) -> EvaluatedModel:
    """Compare the policy with the reference by its files, before it is loaded. Raises `ModelError`.

    Only the policy's log-probs are computed: those of the reference are read from the cache.
    """
    location = options.model
    _check_no_run(Path(location))
    check_revision(location, options.revision)
    config = load_config(location, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check_causal(config, location)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device, getattr(config, "dtype", None))
    identity = check_identity(reference, f"reference {pairs.reference_id[:12]} of {pairs.name}")["identity"]
    is_imported = "imported" in identity  # an imported reference has no weights to compare with
    differing: tuple[str, ...] = ()
    if not is_imported:
        scored_in = getattr(torch, identity["dtype"])
        live = identity_as_recorded(
            identity,
            location,
            config,
            scored_in,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        differing = tuple(differing_fields(identity, live))
    _compare_tokenizers(options, pairs.manifest["tokenization"], log)
    saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return EvaluatedModel(dtype, device, not is_imported and not differing, differing, saved)


def _check_no_run(folder: Path) -> None:
    """Raise `ModelError` for the folder of a training run, whose config.json is not a model's."""
    if (folder / "metrics.jsonl").is_file():
        advice = "It has no model yet: finish it with `dpo-cache train --resume`."
        if (folder / "model").is_dir():
            advice = f"Give {folder / 'model'}."
        raise ModelError(f"{folder}: the folder of a training run, not of a model.\n{advice}")


def _compare_tokenizers(options: EvalOptions, made_with: Document, log: Log) -> None:
    """Log a remark if the policy's own tokenizer is not the one that made the ids.

    The comparison needs a recorded digest, and a tokenizer in the policy's folder.
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
            "assumed to be the same."
        )
        return
    if tokenizer_digest(own) != expected:
        log(
            f"the tokenizer of {options.model} is not the one that made the pairs' ids "
            f"({printable(made_with['tokenizer'])}): another vocabulary, other "
            "rules, special tokens or another chat template. If its ids mean other tokens, the results "
            "are meaningless."
        )
