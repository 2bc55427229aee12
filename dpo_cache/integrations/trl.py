"""TRL's `DPOTrainer` with reference log-probs from a cache: no reference model is loaded.

    trainer = CachedDPOTrainer("MODEL", args=DPOConfig(...), train_dataset=rows, cache="CACHE")
    trainer.train()

TRL tokenizes, collates, computes the losses and trains, as usual. The reference's log-probs are looked up by
the token ids that TRL's collator makes. So another order of rows, another subset or another epoch finds them,
and other ids (from another template, tokenizer or `max_length`) raise an error instead of giving a wrong
number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id

from dpo_cache.errors import DpoCacheError, NotInCacheError, OptionError, StepZeroError, shown_rows
from dpo_cache.integrations.collated import NOTHING, completions_in, keys_of
from dpo_cache.integrations.trl_reference import (
    check_has_rows,
    check_reference,
    drop_reference_adapter,
    only_the_policy,
    open_reference,
    scoring_command,
)
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.log import log_remark
from dpo_cache.precomputing.completions import score_completions
from dpo_cache.precomputing.units import Unit
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.store.starting_model import default_start
from dpo_cache.training.pair_logps import summed_logps
from dpo_cache.training.step_zero import TOLERANCES
from dpo_cache.types import Completion

LOOKED_UP = 1000  # rows that are looked up at once
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # columns of TRL's tokenized rows
NAMES = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's columns of log-probs
STEP_ZERO = ("stop", "warn", "off")


class CachedDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` that reads the reference's log-probs from a cache.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, peft_config, ...: those of `DPOTrainer`.
        cache: a folder or an fsspec URL.
        reference: id of the reference in the cache, or its first characters; default: the only one.
        score_missing: score completions that the cache lacks before training, with the reference's own
            checkpoint, or with the policy's if the cache has no reference. The model is loaded for that
            and released.
        step_zero: what happens if the policy does not repeat the cached log-probs in the first batch, before
            any update: stop, warn or off (for a policy that starts from another checkpoint). A policy with a
            new adapter (`peft_config`) may also repeat them without the adapter.

    Evaluation sets, also those that are given to `evaluate` after training, streams (`IterableDataset`),
    adapters and LD-DPO (`ld_alpha`) work. Raises `NotInCacheError` for completions that the cache lacks, and
    `StepZeroError`; `DataError` for a data set without rows.
    """

    args: DPOConfig
    model: Any
    processing_class: Any

    def __init__(
        self,
        model: Any,
        *positional: Any,
        args: DPOConfig | None = None,
        cache: str | os.PathLike[str],
        reference: str | None = None,
        score_missing: bool = False,
        step_zero: str = "stop",
        **given: Any,
    ):
        if positional or given.get("ref_model") is not None:
            raise OptionError(
                "CachedDPOTrainer takes the reference's log-probs from `cache`, not from a model.\n"
                "Leave `ref_model` out, and give the other arguments by their names."
            )
        if step_zero not in STEP_ZERO:
            raise OptionError(f"`step_zero` {step_zero}: expected {', '.join(STEP_ZERO)}.")
        self._policy_name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = args or DPOConfig(f"{self._policy_name.rstrip('/').split('/')[-1]}-DPO")
        self._cache, self._reference = open_reference(
            str(cache), reference, self._policy_name, args, may_be_new=score_missing
        )
        self._scores = self._cache.scores(self._reference) if self._reference else None
        self._scores_missing = score_missing
        self._step_zero, self._is_compared = step_zero, step_zero == "off"
        self._has_new_adapter = given.get("peft_config") is not None
        check_reference(args, given.get("train_dataset"))
        for name in ("train_dataset", "eval_dataset"):
            check_has_rows(given.get(name), name)
        # TRL then reads reference log-probs from columns, and loads no reference
        args.precompute_ref_log_probs = True
        with only_the_policy(is_loaded=not isinstance(model, str)):
            super().__init__(model, args=args, **given)
        drop_reference_adapter(self.model)

    def _precompute_ref_logps(self, dataset: Any, name: str, _: int) -> Any:
        """The data set with the columns of reference log-probs; TRL calls this for each of its sets."""
        return self._with_logps(dataset, name)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as `DPOTrainer.evaluate` does. A data set given here may be new, even after training."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not isinstance(eval_dataset, dict):
            return self._evaluate_one(eval_dataset, "eval", ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, dataset in eval_dataset.items():
            metrics |= self._evaluate_one(dataset, name, ignore_keys, f"{metric_key_prefix}_{name}")
        return metrics

    def _evaluate_one(
        self, dataset: Any, name: str, ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        check_has_rows(dataset, "eval_dataset")
        prepared = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        # skips DPOTrainer's method, which refuses: it would compute the reference with the trained policy
        return super(DPOTrainer, self).evaluate(self._with_logps(prepared, name), ignore_keys, prefix)

    def _with_logps(self, dataset: Any, name: str) -> Any:
        if isinstance(dataset, IterableDataset):
            if self._scores_missing:
                raise OptionError(
                    f"`score_missing` and a stream ({name}): what the cache lacks is known only at its end.\n"
                    "Leave `score_missing` out, or give a `Dataset`."
                )
            return dataset.map(
                partial(self._look_up, name), batched=True, batch_size=LOOKED_UP, with_indices=True
            )
        if self._scores_missing:
            self._score_missing(dataset, name)
        return dataset.map(
            partial(self._look_up, name),
            batched=True,
            batch_size=LOOKED_UP,
            with_indices=True,
            load_from_cache_file=False,  # the values depend on the cache
            desc=f"Looking up the reference's log-probs of {name}",
        )

    def _look_up(self, name: str, rows: dict[str, list[Any]], places: Sequence[int]) -> dict[str, Any]:
        """The reference's log-probs of the chosen and the rejected completions of some rows."""
        completions = self._completions(rows)
        keys, is_wanted = keys_of(completions)
        lacks = is_wanted & ~self._contains(keys)
        if lacks.any():
            raise self._not_in_cache(
                sorted({places[place % len(places)] for place in np.flatnonzero(lacks).tolist()}), name
            )
        found = iter(self._scores.fetch(keys[is_wanted]) if self._scores else ())
        scores = [next(found) if wanted else NOTHING for wanted in is_wanted]
        return dict(zip(NAMES, np.split(summed_logps(scores, self.args.ld_alpha), 2), strict=True))

    def _completions(self, rows: dict[str, list[Any]]) -> list[Completion | None]:
        """All chosen completions of tokenized rows, then all rejected ones, as TRL's collator cuts them."""
        columns = [rows[name] for name in COLUMNS]
        examples = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
        return completions_in(self.data_collator(examples))

    def _contains(self, keys: np.ndarray) -> np.ndarray:
        return np.zeros(len(keys), bool) if self._scores is None else self._scores.contains(keys)

    def _score_missing(self, dataset: Dataset, name: str) -> None:
        """Score the completions of a data set that the cache lacks. The main process scores; its error is
        raised on all.
        """
        error = None
        if self.accelerator.is_main_process:
            try:
                self._score_here(dataset, name)
            except DpoCacheError as found:
                error = found
        self._reference, error = broadcast_object_list([self._reference, error])
        if error:
            raise error
        self._scores = self._cache.scores(self._reference) if self._reference else None

    def _score_here(self, dataset: Dataset, name: str) -> None:
        if unit := self._missing(dataset, name):
            model, revision, dtype = self._policy_name, None, "auto"
            if self._reference:
                entry = self._cache.read_reference(self._reference)
                model, revision = default_start(entry)
                dtype = entry["identity"]["dtype"]
            self._reference = score_completions(
                self._cache,
                model,
                unit,
                revision=revision,
                dtype=dtype,
                expected=self._reference,
                # runs only code of a model that the caller named, never of one that the cache names
                trust_remote_code=self.args.trust_remote_code and model == self._policy_name,
            )

    def _missing(self, dataset: Dataset, name: str) -> Unit | None:
        found: dict[bytes, Completion] = {}
        rows: dict[bytes, list[int]] = {}
        for start in range(0, len(dataset), LOOKED_UP):
            completions = self._completions(dataset[start : start + LOOKED_UP])
            keys, is_wanted = keys_of(completions)
            for place in np.flatnonzero(is_wanted & ~self._contains(keys)).tolist():
                key, completion = key_bytes(keys[place : place + 1])[0], completions[place]
                assert completion is not None
                found[key] = completion
                rows.setdefault(key, []).append(start + place % (len(completions) // 2))
        if not found:
            return None
        num_tokens = count_forest_tokens([*found.values()])
        return Unit([*found], [*found.values()], [rows[key][:3] for key in found], num_tokens, name)

    def _not_in_cache(self, rows: list[int], name: str) -> NotInCacheError:
        return NotInCacheError(
            f"{self._cache}: completions of row{'s' * (len(rows) > 1)} {shown_rows(rows)} of the {name} "
            "data set have no score: their token ids, as TRL makes them, are not in the cache.\n"
            f"Run {scoring_command(str(self._cache), self._policy_name, self.args)}, with this tokenizer "
            "and chat template on this data, or give `score_missing`."
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        result = super()._compute_loss(model, inputs, return_outputs)
        if not self._is_compared:
            self._is_compared = True
            if self.state.global_step == 0:
                self._compare(model, inputs)
        return result

    def _compare(self, model: Any, inputs: dict[str, Any]) -> None:
        """Compare the policy's log-probs of the first batch with the cached ones. Raises `StepZeroError`."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        gap = self._gap([metrics[f"logps/{side}"][-1] for side in ("chosen", "rejected")], inputs)
        if gap > 0 and self._has_new_adapter:  # prompt tuning, for one, changes the policy from the start
            base = self.compute_ref_log_probs(model, inputs)
            gap = self._gap([float(self.accelerator.gather(logps).mean()) for logps in base], inputs)
        if gap <= 0:
            return
        problem = (
            f"before any update the policy's log-probs of the first batch differ from the cached ones by "
            f"{gap:.3g} nats a completion more than rounding explains: the policy is not the reference."
        )
        if self._step_zero == "stop":
            raise StepZeroError(
                f"{problem}\nGive the model that scored the cache; `step_zero` off is for a policy that "
                "starts from another one."
            )
        log_remark(problem)

    def _gap(self, logps: Sequence[float], inputs: dict[str, Any]) -> float:
        """The gap by which the batch's mean log-probs, chosen and rejected, differ from the cached ones
        beyond rounding, in nats; the larger of the two.
        """
        absolute, relative = TOLERANCES[_dtype_of(self)]
        cached = [float(self.accelerator.gather(inputs[name]).mean()) for name in NAMES]
        return max(
            abs(one - other) - absolute - relative * abs(other)
            for one, other in zip(logps, cached, strict=True)
        )


def _dtype_of(trainer: CachedDPOTrainer) -> str:
    """The dtype of the policy's matrix products, as a key of the tolerances."""
    if trainer.args.bf16 or trainer.args.fp16:
        return "bfloat16"
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    return dtype if dtype in TOLERANCES else "bfloat16"
