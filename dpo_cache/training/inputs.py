"""The pairs and the policy of a run, opened and checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import DpoCacheError, ModelError, OptionError, TrainingError
from dpo_cache.lm.check_logps import FOREST
from dpo_cache.lm.device import autocast
from dpo_cache.lm.kernels.onednn_linear import CLEAR_SPEEDUP
from dpo_cache.lm.layerwise.frozen_tables import tables_on_host
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.adapter import (
    CheckpointLocation,
    can_be_switched_off,
    is_identity_at_init,
    locate_checkpoint,
)
from dpo_cache.lm.model.left_out import LeftOut, find_left_out
from dpo_cache.lm.model.load import load_base, load_config
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.model.towers import frozen_towers
from dpo_cache.lm.policy import PolicyModel, default_micro_tokens
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.lm.sharded import ShardedModel
from dpo_cache.log import Log
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.losses import LossOptions
from dpo_cache.options.placement import FAST, Placement
from dpo_cache.options.train import TrainOptions
from dpo_cache.planning.parts import Method
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.format.checks import check_details, check_identity
from dpo_cache.store.format.documents import Document
from dpo_cache.training.adapters import has_adapter, put_adapter
from dpo_cache.training.batches import held_out
from dpo_cache.training.before_loading import check_before_loading
from dpo_cache.training.gradient_check import with_right_kernel
from dpo_cache.training.layer_major import (
    LayerMajorModel,
    has_copies,
    keeps_tables_on_host,
    make_transfer,
    open_layer_major,
)
from dpo_cache.training.lengths import SCANNED_PAIRS, RowLengths, measure_rows, model_limits
from dpo_cache.training.loaded import LoadedPolicy
from dpo_cache.training.origin import Origin, compare_origin
from dpo_cache.training.parallel import cut, load_to_cut
from dpo_cache.training.placing import choose_precision, place_run, planned_method
from dpo_cache.training.ranks import Ranks
from dpo_cache.training.saved_tokenizer import choose_tokenizer, restore_tokenizer
from dpo_cache.training.start import find_start, trusts_code

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

    @property
    def pair_sets(self) -> list[PairSet]:
        """The sets that are read, each once."""
        has_others = self.eval_pairs is not None and self.eval_pairs is not self.pairs
        return [self.pairs, self.eval_pairs] if has_others else [self.pairs]  # type: ignore[list-item]

    def limit_to(self, config: PreTrainedConfig, name: str) -> None:
        """Make reading raise `ModelError` for a pair that a model of this config cannot read."""
        limits = model_limits(config, name)
        self.pairs.limit_to(limits)
        if self.eval_pairs is not None:
            self.eval_pairs.limit_to(limits)


@dataclass(frozen=True)
class TrainedModel:
    """The model to train, the way to run it, and the parts that are saved with it."""

    model: PreTrainedModel
    location: str
    tokenizer: PreTrainedTokenizerBase
    attention: AttentionChoice
    precision: str
    linear: str  # the library that multiplies, see `use_fast_linear`
    recomputation: Recomputation
    origin: Origin
    adapted: PeftModel | None  # the PEFT model, for saving, switching off and merging the adapter
    remarks: tuple[str, ...]  # differences from the model that made the pairs, besides `origin.differing`
    method: Method  # the training method, for a prediction of its memory
    left_out: LeftOut | None = None  # other parts of its checkpoint, which are saved with a whole model
    memory: str = "fast"  # the preset of the placement, or its entries
    placement: Placement = FAST
    layer_major: LayerMajorModel | None = None  # None: each forest runs through all layers
    sharded: ShardedModel | None = None  # runs the model if each rank has shards of its weights

    def clips(self, options: TrainOptions) -> bool:
        """Return whether the gradient is clipped."""
        return options.max_grad_norm > 0 and self.placement.gradients != "none"

    @property
    def base_is_reference(self) -> bool:
        """Return whether the policy with its adapter switched off is known to be the model that scored the
        pairs.
        """
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
        check_details(eval_pairs.manifest, f"{cache}/pairs/{eval_pairs.name}/manifest.json")
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
    reference = check_identity(
        cache.read_reference(pairs.reference_id), f"{cache}/references/{pairs.reference_id}/reference.json"
    )
    return TrainingPairs(pairs, selected, eval_pairs, eval_selected, reference)


@contextmanager
def open_policy(
    options: TrainOptions,
    data: TrainingPairs,
    device: torch.device,
    checkpoint: Path | None,
    *,
    linear: str | None,
    memory: str | None,
    log: Log,
    loaded: LoadedPolicy | None = None,
    ranks: Ranks | None = None,
) -> Iterator[TrainedModel]:
    """Load the policy, or take a `loaded` one, with its weights at the start or at the checkpoint.

    It is prepared until the block ends. `linear` chooses the library that multiplies, see `prepared`, and
    `memory` is the preset under `auto`. All `ranks` run the policy alike. Raises `ModelError`,
    `TrainingError` or `OptionError`.
    """
    ranks = ranks or Ranks()
    if ranks.shards and loaded is not None:
        raise OptionError(
            f"{loaded.name}: `parallel` fsdp reads weights from files, and this model is loaded already.\n"
            "Give its path or Hub id instead, or use `parallel` ddp."
        )
    is_resumed = checkpoint is not None
    start = find_start(options, data.reference, log, is_resumed=is_resumed)
    trusted = trusts_code(options, start)
    if loaded is not None:
        parts = loaded.locate(options, checkpoint)
    elif checkpoint is not None:  # it has everything but an adapter's base
        parts = locate_checkpoint(str(checkpoint))
    else:
        parts = locate_checkpoint(start.location, start.revision)
    is_adapted = has_adapter(options, parts, start.location, is_resumed=is_resumed)
    given = loaded.tokenizer if loaded is not None else None
    if checkpoint is not None and given is None:
        saved = restore_tokenizer(str(checkpoint), trusted=trusted)
    else:
        places = [(start.location, start.revision), (parts.base, parts.base_revision)]
        saved = choose_tokenizer(options, data.pairs.manifest, places, given, log, trusted=trusted)
    precision = choose_precision(options.precision, device)
    is_bf16 = precision == "bf16" or (precision == "bf16-mixed" and is_adapted)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    origin = compare_origin(
        options,
        data.reference,
        None if is_resumed else start,
        (parts.base, parts.base_revision) if is_adapted else None,
        dtype,
        loaded,
        trusted=trusted,
    )
    if loaded is not None:
        config = loaded.model.config
    else:
        config = load_config(parts.base, revision=parts.base_revision, trust_remote_code=trusted)
    method = planned_method(options, precision, is_adapted=is_adapted)
    data.limit_to(config, start.location)
    memory, placement = place_run(
        options,
        method,
        config,
        device,
        memory,
        log,
        ranks,
        pairs=(scored.pair for scored in islice(data.pairs, SCANNED_PAIRS)),
        present_bytes=0 if loaded is None else loaded.bytes_on(device),
    )
    lengths = measure_rows(data.pair_sets, config)
    if loaded is None and not is_resumed and ranks.is_main:
        check_before_loading(options, config, parts, dtype, is_adapted=is_adapted, trusted=trusted)
    home, streamed = torch.device("cpu") if has_copies(placement, device) else device, None
    loading: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trusted,
        "quantize": options.quantize,
        "compute_dtype": torch.float32 if precision == "fp32" else torch.bfloat16,
    }
    if loaded is not None:
        model = loaded.place(dtype, home, None if is_adapted else checkpoint)
    elif ranks.shards:
        model, streamed = load_to_cut(parts, log, **loading)
    elif placement.weights == "disk" or (is_adapted and home != device):
        model, streamed = load_streamed(
            replace(parts, adapter=None),
            device=device,
            weights=placement.weights,
            embedding="host",
            transfer=make_transfer(),
            **loading,
        )
    else:
        model = load_base(parts, device=home, **loading)
    is_whole = not is_adapted or options.merge_adapter  # True if a whole model is saved
    left_out = find_left_out(model, parts.base, parts.base_revision) if is_whole else None
    with ExitStack() as stack:
        found: LayerMajorModel | str = ""
        if placement.is_layer_major:
            found = stack.enter_context(open_layer_major(model, placement, device, precision, streamed))
        adapted = put_adapter(options, model, parts, log) if is_adapted else None
        for context in (frozen_towers(model), in_eval_mode(model)):
            stack.enter_context(context)
        if isinstance(found, LayerMajorModel) and keeps_tables_on_host(placement, device):
            stack.enter_context(tables_on_host(model, device))
        sharded = cut(model, device, streamed) if ranks.shards else None
        if not (measures := linear is None and ranks.is_main):
            linear = linear or ranks.share(None)  # waits until the main rank has measured
        run = stack.enter_context(
            prepared(
                model,
                trains=True,
                offloads=isinstance(found, str) and placement.inputs == "host",
                min_speedup=CLEAR_SPEEDUP,
                linear=linear,
                log=log,
            )
        )
        if measures:
            ranks.share(run.linear)
        assert run.recomputation is not None
        if isinstance(found, str) and found:
            log(f"{found}. Each forest runs through all layers instead, as under `memory` fast.")
        # copies of weights may have the dtype of the products, which only mixed precision allows
        with (
            autocast(device, precision if has_copies(placement, device) else "fp32"),
            sharded.gathered() if sharded else nullcontext(),
        ):
            attention = _choose_attention(options, data, model, lengths, may_retry=not sharded)
        attention = _agreed(ranks, model, attention)
        if isinstance(found, str) or not has_copies(placement, device):
            attention = with_right_kernel(
                model, attention, run.recomputation, precision, log, sharded=sharded, ranks=ranks
            )
        else:  # copies of weights would be gone before the backward pass of a plain run
            policy = PolicyModel(model, attention, precision=precision)
            attention = found.with_right_kernel(policy, log, ranks)
        yield TrainedModel(
            model=model,
            location=start.location,
            tokenizer=saved.tokenizer,
            attention=attention,
            precision=precision,
            linear=run.linear,
            recomputation=run.recomputation,
            origin=origin,
            adapted=adapted,
            remarks=()
            if is_resumed
            else _find_remarks(options, adapted, parts, has_other_template=saved.has_other_template),
            method=method,
            left_out=left_out,
            memory="fast" if isinstance(found, str) else memory,
            placement=placement,
            layer_major=None if isinstance(found, str) else found,
            sharded=sharded,
        )


def _agreed(ranks: Ranks, model: PreTrainedModel, attention: AttentionChoice) -> AttentionChoice:
    """The main rank's choice. Raises `ModelError` if another rank has made another one: on another device, or
    with less memory.
    """
    choices = ranks.gather(attention)
    for index, other in enumerate(choices):
        if (other.name, other.is_whole) != (choices[0].name, choices[0].is_whole):
            raise ModelError(
                f"{type(model).__name__} runs as {choices[0].name} on rank 0 ({choices[0].reason}), and as "
                f"{other.name} on rank {index} ({other.reason}).\n"
                "Use devices of one kind with the same free memory."
            )
    return choices[0]


def _choose_attention(
    options: TrainOptions, data: TrainingPairs, model: PreTrainedModel, rows: RowLengths, *, may_retry: bool
) -> AttentionChoice:
    """The attention for the rows of both pair sets, checked in forests as large as the run's."""
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
        may_retry=may_retry,
    )


def _find_remarks(
    options: TrainOptions, adapted: PeftModel | None, parts: CheckpointLocation, *, has_other_template: bool
) -> tuple[str, ...]:
    """Differences that `Origin` does not cover: a named model's chat template, and a fresh adapter."""
    remarks = []
    if options.model is not None and has_other_template:
        remarks.append(
            f"template (the chat template of {options.model} is not the one that the pairs were made with)"
        )
    if adapted is not None and parts.adapter is None and not is_identity_at_init(adapted):
        remarks.append(
            "adapter (a fresh adapter of its kind may change the model: see the initial values in its config)"
        )
    return tuple(remarks)


def check_token_logps(options: LossOptions, pairs: PairSet, error: type[DpoCacheError]) -> None:
    """Raise the error if a loss needs the reference's token log-probs, but the pairs have only sums.

    Such pairs come only from an import.
    """
    if options.ld_alpha is not None and options.ld_reference and not pairs.has_token_logps:
        raise error(
            f"{pairs.name} holds only sums of log-probs, and `ld_alpha` weights the reference's tokens, "
            "too.\n"
            "Use `ld_reference=False`, or score the pairs with `dpo-cache precompute`."
        )
