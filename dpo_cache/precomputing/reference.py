"""The reference of a run: which model it is, known before it is loaded, and how it is made ready to score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import choose_device, choose_dtype
from dpo_cache.lm.model.identity import provenance, reference_identity
from dpo_cache.log import Log
from dpo_cache.options.base import number_or_auto
from dpo_cache.precomputing.inputs import Inputs
from dpo_cache.store import Cache, ScoreIndex
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document, digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dpo_cache.lm.runner import Runner  # imports the code that runs models


@dataclass(frozen=True)
class Reference:
    """A frozen model, its identity and where it came from."""

    name: str  # for errors
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    identity: Document
    provenance: Document

    @cached_property
    def id(self) -> str:
        return digest_json(self.identity)


@dataclass(frozen=True)
class Target:
    """Where a run's scores go: a cache, and the scores of one reference in it."""

    cache: Cache
    reference: Reference
    scores: ScoreIndex


def open_target(cache: Cache, reference: Reference, expected: str | None) -> Target:
    """The reference's scores in the cache. Raises `ModelError` if its id does not start with `expected`."""
    if expected:
        _check_expected(cache, reference, expected)
    return Target(cache, reference, cache.scores(reference.id))


def identify_reference(inputs: Inputs, config: PreTrainedConfig, tokenizer: str, log: Log) -> Reference:
    """Identify the model by its files or, if it is loaded already, by its tensors. Raises `ModelError`."""
    if inputs.model is not None:
        return _identify_loaded(inputs, tokenizer, log)
    options = inputs.options
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device, getattr(config, "dtype", None))
    identity = reference_identity(
        options.model, config, dtype, revision=options.revision, quantize=options.quantize
    )
    origin = provenance(
        options.model,
        revision=options.revision,
        device=device,
        attention=options.attention,
        tokenizer=tokenizer,
    )
    return Reference(options.model, config, device, dtype, identity, origin)


@contextmanager
def open_reference(inputs: Inputs, reference: Reference, log: Log) -> Iterator[Runner]:
    """Load the model, unless it is loaded already, and make it ready to score."""
    from dpo_cache.lm.runner import open_runner, run_loaded  # not imported where nothing is scored

    options = inputs.options
    budget_tokens = number_or_auto("budget_tokens", options.budget_tokens)
    if inputs.model is not None:
        opened = run_loaded(
            inputs.model,
            name=reference.name,
            attention=options.attention,
            max_length=options.max_length,
            budget_tokens=budget_tokens,
            log=log,
        )
    else:
        opened = open_runner(
            options.model,
            dtype=reference.dtype,
            device=reference.device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            quantize=options.quantize,
            attention=options.attention,
            max_length=options.max_length,
            budget_tokens=budget_tokens,
            log=log,
        )
    with opened as runner:
        yield runner


def _check_expected(cache: Cache, reference: Reference, prefix: str) -> None:
    """Raise `ModelError` if the model is another reference than the one whose id starts with `prefix`."""
    if reference.id.startswith(prefix):
        return
    expected = cache.find_reference(prefix)
    differing = differing_fields(cache.read_reference(expected)["identity"], reference.identity)
    raise ModelError(
        f"{reference.name} is not reference {expected[:12]} of {cache}: they differ in\n"
        + "".join(f"  {line}\n" for line in differing)
        + "Give the model, dtype and quantization that it was scored with, or leave "
        "`reference` out to score another reference."
    )


def _identify_loaded(inputs: Inputs, tokenizer: str, log: Log) -> Reference:
    from dpo_cache.lm.model.loaded import identify_loaded

    model, options = inputs.model, inputs.options
    assert model is not None
    identity, difference = identify_loaded(
        model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    origin = provenance(
        options.model,
        revision=options.revision,
        device=model.device,
        attention=options.attention,
        tokenizer=tokenizer,
    )
    if difference is not None:
        loaded_from = f", loaded from {origin['model']}" if model.name_or_path else ""
        described = f"{type(model).__name__} in memory{loaded_from}"
        origin |= {"model": None, "revision": None, "described": described}
        log(
            f"the model is a reference of its own, not the one at {options.model}: {difference}."
            if model.name_or_path
            else f"the model is a reference of its own: {difference}."
        )
    return Reference(options.model, model.config, model.device, model.dtype, identity, origin)
