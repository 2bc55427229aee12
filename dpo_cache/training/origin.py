"""Compares the model that a run starts from with the one that scored the pairs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache as call_once

import torch

from dpo_cache.lm.model.identity import identity_as_recorded, reference_identity
from dpo_cache.lm.model.load import load_config
from dpo_cache.options.train import TrainOptions
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.training.loaded import LoadedPolicy
from dpo_cache.training.start import Start, is_same_place


@dataclass(frozen=True)
class Origin:
    """The comparison of the model that a run starts from with the one that scored the pairs, by their
    identities.

    An imported reference has no weights to compare with; step zero compares the log-probs.
    """

    is_reference: bool  # True if both are known to be the same model
    differing: tuple[str, ...]  # otherwise, the fields in which their identities differ
    base_is_reference: bool  # True if the base under an adapter is the reference
    base_weights: str | None  # digest of the base's weights
    is_named: bool = False  # True if `import` named this model as the source of the imported log-probs


def compare_origin(
    options: TrainOptions,
    reference: Document,
    start: Start | None,
    base: tuple[str, str | None] | None,
    dtype: torch.dtype,
    loaded: LoadedPolicy | None,
    *,
    trusted: bool,
) -> Origin:
    """Compare the model at `start` and the `base` of an adapter, a location and revision, with the reference.

    `trusted` lets Python code of both run.
    """
    recorded = reference["identity"]
    is_imported = "imported" in recorded

    @call_once
    def identify(location: str, revision: str | None, scored_in: torch.dtype) -> Document:
        if loaded is not None:
            return loaded.identify(dtype, recorded, scored_in, trust_remote_code=trusted)
        config = load_config(location, revision=revision, trust_remote_code=trusted)
        return identity_as_recorded(
            recorded,
            location,
            config,
            scored_in,
            revision=revision,
            quantize=options.quantize,
            trust_remote_code=trusted,
        )

    def compare(location: str, revision: str | None) -> tuple[str, ...]:  # ignores the dtype
        live = identify(location, revision, getattr(torch, recorded["dtype"]))
        return tuple(differing_fields(recorded, {**live, "dtype": recorded["dtype"]}))

    differing = compare(start.location, start.revision) if start and not is_imported else ()
    return Origin(
        is_reference=start is not None and not is_imported and not differing,
        differing=differing,
        base_is_reference=base is not None and not is_imported and not compare(*base),
        base_weights=identify(*base, torch.float32)["weights"] if base else None,
        is_named=is_imported
        and start is not None
        and options.quantize == "none"
        and _is_named(reference["provenance"], start, dtype, loaded, trusted=trusted),
    )


def _is_named(
    source: Document, start: Start, dtype: torch.dtype, loaded: LoadedPolicy | None, *, trusted: bool
) -> bool:
    """Return whether the model at the start is the one that `import --model` named: the same place, or the
    same identity. Python code from the place that the cache names does not run.
    """
    location, revision = source.get("model"), source.get("revision")
    if not isinstance(location, str):
        return False
    if loaded is None and (start.location, start.revision) == (location, revision):
        return True
    if not os.path.isdir(location):
        return False

    def identify(location: str, revision: str | None, *, trusted: bool) -> Document:
        config = load_config(location, revision=revision, trust_remote_code=trusted)
        return reference_identity(
            location, config, torch.float32, revision=revision, trust_remote_code=trusted
        )

    expected = identify(location, revision, trusted=trusted and is_same_place(location, start.location))
    if loaded is not None:
        return loaded.identify(dtype, expected, torch.float32, trust_remote_code=trusted) == expected
    return identify(start.location, start.revision, trusted=trusted) == expected
