"""The reference of a run: identified before the model is loaded, then opened for scoring."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import check_one_device, choose_device, choose_dtype
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.former_identity import former_identity
from dpo_cache.lm.model.identity import provenance, reference_identity
from dpo_cache.lm.streaming import Readings, Streaming, choose_streaming, count_readings
from dpo_cache.log import Log, log_remark
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.precompute import audit_interval
from dpo_cache.precomputing.inputs import Inputs
from dpo_cache.precomputing.windows import Totals
from dpo_cache.store import Cache, ScoreIndex
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document, digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from dpo_cache.lm.runner import Runner  # imports the code that runs models


@dataclass(frozen=True)
class Reference:
    """A frozen model, its identity and its provenance."""

    name: str  # shown in errors
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    identity: Document
    provenance: Document
    former: Callable[[], Document] | None = None  # computes the identity that earlier versions used

    @cached_property
    def id(self) -> str:
        return digest_json(self.identity)


@dataclass(frozen=True)
class Target:
    """The destination of a run's scores: a cache, and the scores of one reference in it."""

    cache: Cache
    reference: Reference
    scores: ScoreIndex


def open_target(cache: Cache, reference: Reference, expected: str | None, log: Log = log_remark) -> Target:
    """The reference's scores in the cache. Raises `ModelError` if its id does not start with `expected`.

    `log` gets a remark if the cache holds scores of the model under the id that earlier versions gave it.
    """
    if expected and not reference.id.startswith(expected):
        other = cache.find_reference(expected)
        differing = differing_fields(cache.read_reference(other)["identity"], reference.identity)
        raise ModelError(
            f"{reference.name} is not reference {other[:12]} of {cache}: they differ in\n"
            + "".join(f"  {line}\n" for line in differing)
            + "Give the model, dtype and quantization that it was scored with, or leave "
            "`reference` out to score another reference."
        )
    _log_new_id(cache, reference, log)
    return Target(cache, reference, cache.scores(reference.id))


def _log_new_id(cache: Cache, reference: Reference, log: Log) -> None:
    known = cache.references()
    if reference.former is None or not known or reference.id in known:
        return
    former = digest_json(reference.former())
    if former == reference.id or former not in known:
        return
    if "code" in reference.identity:
        reason = "its own code, which `trust_remote_code` runs, is a part of the id now"
    elif "adapter" in reference.identity:
        reason = "which modules its adapter is applied to, and how, is a part of the id now"
    else:
        reason = (
            "weights that the model does not load, their form in the files, and an `auto_map` whose code "
            "does not run are no longer a part of the id"
        )
    log(
        f"{reference.name} has another id than before ({former[:12]}, now {reference.id[:12]}): {reason}. "
        "The scores under its former id could be those of another model, so its completions are scored "
        "again; `dpo-cache rm` removes them."
    )


def identify_reference(
    inputs: Inputs, config: PreTrainedConfig, tokenizer: str, log: Log, device: torch.device | None = None
) -> Reference:
    """Identify the model by its files or, if it is loaded already, by its tensors. Raises `ModelError`.

    `device` is given if other machines score: they may have a device that this machine lacks.
    """
    options, model = inputs.options, inputs.model
    if model is None:
        device = device or choose_device(options.device)
        dtype = choose_dtype(options.dtype, device, getattr(config, "dtype", None))
        identity = reference_identity(
            options.model,
            config,
            dtype,
            revision=options.revision,
            quantize=options.quantize,
            trust_remote_code=options.trust_remote_code,
        )
        difference = None
    else:
        from dpo_cache.lm.model.loaded import identify_loaded

        check_one_device(model)
        device, dtype = model.device, model.dtype
        identity, difference = identify_loaded(
            model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    origin = provenance(
        options.model,
        revision=options.revision,
        device=device,
        attention=options.attention,
        tokenizer=tokenizer,
    )
    if model is not None and difference is not None:
        origin |= _describe_in_memory(model, origin["model"])
        checkpoint = f", not the one at {options.model}" if model.name_or_path else ""
        log(f"the model is a separate reference{checkpoint}: {difference}.")

    def former() -> Document:
        parts = locate_checkpoint(options.model, options.revision)
        return former_identity(parts, config, dtype, options.quantize)

    from_files = model is None or difference is None
    return Reference(options.model, config, device, dtype, identity, origin, former if from_files else None)


def choose_reference_streaming(inputs: Inputs, reference: Reference) -> Streaming | None:
    """The way to read weights that are not kept on the device; None if they are kept there."""
    options = inputs.options
    is_elsewhere = reference.device.type == "cuda" and not torch.cuda.is_available()  # workers choose
    if inputs.model is not None or options.device_map == "auto" or is_elsewhere:
        return None
    return choose_streaming(
        options.stream_weights,
        options.model,
        reference.config,
        revision=options.revision,
        dtype=reference.dtype,
        device=reference.device,
        quantize=options.quantize,
    )


def plan_readings(inputs: Inputs, reference: Reference, streaming: Streaming, totals: Totals) -> Readings:
    """The number of times that a run over these rows reads the weights, and its cost."""
    return count_readings(
        streaming,
        reference.device,
        reference.dtype,
        num_tokens=totals.missing_tokens,
        num_completions=totals.distinct_completions - totals.already_cached,
        audit_interval=audit_interval(inputs.options.audit),
    )


def open_reference(
    inputs: Inputs,
    reference: Reference,
    log: Log,
    *,
    longest: int,
    run_tokens: int,
    streaming: Streaming | None = None,
) -> AbstractContextManager[Runner]:
    """Load the model, unless it is loaded already, and prepare it for rows of up to `longest` tokens and
    about `run_tokens` in all.
    """
    from dpo_cache.lm.runner import open_runner, run_loaded  # only imported if anything is scored

    options = inputs.options
    budget_tokens = number_or_auto("budget_tokens", options.budget_tokens)
    if inputs.model is not None:
        return run_loaded(
            inputs.model,
            name=reference.name,
            attention=options.attention,
            max_length=longest,
            budget_tokens=budget_tokens,
            run_tokens=run_tokens,
            log=log,
        )
    return open_runner(
        options.model,
        dtype=reference.dtype,
        device=reference.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        quantize=options.quantize,
        attention=options.attention,
        max_length=longest,
        budget_tokens=budget_tokens,
        run_tokens=run_tokens,
        streaming=streaming,
        device_map=options.device_map,
        log=log,
    )


def _describe_in_memory(model: PreTrainedModel, location: str) -> Document:
    """The provenance of a model that differs from its checkpoint at `location`, or has no checkpoint."""
    loaded_from = f", loaded from {location}" if model.name_or_path else ""
    return {
        "model": None,
        "revision": None,
        "described": f"{type(model).__name__} in memory{loaded_from}",
    }
