"""data -> lm -> store: score the reference's log-probs of a data set, once.

read rows -> tokenize -> key and plan -> score what is missing -> publish scores -> publish pairs
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from dpo_cache import data
from dpo_cache.errors import ModelError
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.device import choose_device, choose_dtype, peak_bytes
from dpo_cache.lm.kernels.onednn_linear import use_fast_linear
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.identity import provenance, reference_identity
from dpo_cache.lm.model.load import check_causal, load_config, load_model
from dpo_cache.lm.progress import ScoringProgress
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.log import Log, log_remark
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.precompute import PrecomputeOptions, renamed_columns
from dpo_cache.planning.disk import check_disk
from dpo_cache.precomputing.report import PrecomputeReport
from dpo_cache.precomputing.units import Planner, SplitPlan, Window, missing_completions, pairs_of, rows_of
from dpo_cache.store import Cache, PairSet, ScoreIndex, open_cache
from dpo_cache.store.cache import check_name
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import digest_json
from dpo_cache.types import Completion, Score, ScoredPair

FLUSH_S = 20.0  # seconds of scoring that a crash can cost

OnSurvey = Callable[[data.Survey], None]
OnProgress = Callable[["ScoringProgress"], None]


def precompute(
    model: str | os.PathLike[str],
    dataset: str | os.PathLike[str],
    cache: str | os.PathLike[str],
    *,
    on_survey: OnSurvey | None = None,
    on_progress: OnProgress | None = None,
    log: Log | None = None,
    **options: Any,
) -> PrecomputeReport:
    """Score what the cache lacks of the data set's completions and publish its pair sets.

    Keyword arguments are the fields of `PrecomputeOptions`. Only completions that no earlier run scored
    under the same reference are run through the model, and the model is loaded only if there are any.
    Scores are published as they come, at the latest every 20 seconds: a run that is killed is taken up
    where it was by running it again. The global random state is left alone.

    With `dry_run` the data is surveyed and nothing else happens: no model is loaded, nothing is written.

    `on_survey` gets what each split holds before the model is loaded (of a stream: when it has ended),
    `on_progress` is called after every chunk, `log` gets each remark (default: the package's logger).
    Raises `DpoCacheError`; nothing that was published before is lost.
    """
    chosen = PrecomputeOptions(
        model=os.fspath(model), dataset=os.fspath(dataset), cache=os.fspath(cache), **options
    )
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as spool:  # written to by streams alone
        run = _Precompute(chosen, Path(spool), log or log_remark)
        return run.run(on_survey or (lambda _: None), on_progress or (lambda _: None))


class _Precompute:
    """One run: its options, its reference, and the model once it is needed."""

    def __init__(self, options: PrecomputeOptions, spool: Path, log: Log):
        self.options, self.spool, self.log = options, spool, log
        self.started = time.perf_counter()
        self.name = check_name(options.name or data.dataset_name(options.dataset))
        self.truncation = data.Truncation(options.max_length, options.truncation, options.max_prompt_length)
        self.cache: Cache = open_cache(options.cache, create=True)
        self.device = choose_device(options.device)
        self.report = PrecomputeReport(cache=str(self.cache))
        self.loaded: tuple[PreTrainedModel, AttentionChoice] | None = None
        self.finished = (0, 0)  # tokens of the windows that are scored: run, and planned

    def run(self, on_survey: OnSurvey, on_progress: OnProgress) -> PrecomputeReport:
        options = self.options
        self.config = load_config(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        check_causal(self.config, options.model)
        splits = self._read_splits()
        self._identify_reference()
        if (
            options.dry_run or not options.streaming
        ):  # all is tokenized, checked and planned before the first score
            for split in splits:
                list(self._plan(split, on_survey))
            check_disk(self.cache, self.report.data_tokens)
        if options.dry_run:
            self.report.pair_sets = [split.survey.pair_set for split in splits]
            return self._finish_report()
        for split in splits:
            for window in self._plan(split, on_survey) if options.streaming else split.windows:
                self._score(split, window, on_progress)
            self._publish_pairs(split)
        return self._finish_report()

    # -- rows -> token ids -> what is missing ----------------------------------------------------------

    def _read_splits(self) -> list[SplitPlan]:
        """Every split opened and its format known; nothing is tokenized yet."""
        options = self.options
        rename = renamed_columns(options.map)
        tables = data.read_dataset(
            options.dataset, options.split, options.limit, streaming=options.streaming, rename=rename
        )
        splits = []
        for name, rows in tables.items():
            check_name(name)
            place = f"{options.dataset}: split {name}"
            first = data.first_row(rows, place)
            columns = list(rows.column_names or first)
            is_named = options.format != "auto"
            data_format = (
                data.check_format(options.format, columns, place)
                if is_named
                else data.detect_format(columns, first, place)
            )
            if unused := data.unused_columns(data_format, columns, first):
                self.log(
                    f"{place}: the columns {', '.join(unused)} are not used by the format {data_format}."
                )
            if options.ranked_pairs != "all" and data_format != "ranked":
                self.log(
                    f"{place}: --ranked-pairs {options.ranked_pairs} has no effect on the format "
                    f"{data_format}."
                )
            splits.append(SplitPlan(name, rows, data.Survey(f"{self.name}/{name}", data_format)))
        self.tokenizer_place, revision = (
            (options.tokenizer, None)
            if options.tokenizer
            else locate_checkpoint(options.model, options.revision).tokenizer
        )
        self.tokenizer = data.load_tokenizer(
            self.tokenizer_place,
            revision=revision,
            chat_template=options.chat_template,
            trust_remote_code=options.trust_remote_code,
        )
        return splits

    def _identify_reference(self) -> None:
        """The reference's identity, from its files alone, and what the cache has of it."""
        options = self.options
        self.dtype = choose_dtype(options.dtype, self.device, getattr(self.config, "dtype", None))
        self.identity = reference_identity(
            options.model, self.config, self.dtype, revision=options.revision, quantize=options.quantize
        )
        self.report.reference = digest_json(self.identity)
        if options.expect_reference:
            self._check_expected(options.expect_reference)
        self.scores: ScoreIndex = self.cache.scores(self.report.reference)
        self.planner = Planner(self.scores, self.truncation, self.config, options.model)

    def _check_expected(self, prefix: str) -> None:
        """Raise `ModelError` where the model is another reference than the one that starts with these
        characters.
        """
        if self.report.reference.startswith(prefix):
            return
        expected = self.cache.find_reference(prefix)
        differing = differing_fields(self.cache.read_reference(expected)["identity"], self.identity)
        raise ModelError(
            f"{self.options.model} is not reference {expected[:12]} of {self.cache}: they differ in\n"
            + "".join(f"  {line}\n" for line in differing)
            + "Give the model, dtype and quantization that it was scored with, or leave "
            "--expect-reference out to score another reference."
        )

    def _plan(self, split: SplitPlan, on_survey: OnSurvey) -> Iterator[Window]:
        """The split's windows; when they have ended, its survey is told."""
        options = self.options
        tokenized: Iterator[Dataset] = data.tokenized_windows(
            split.rows,
            split.survey.data_format,
            self.tokenizer,
            ranked_pairs=options.ranked_pairs,
            window_rows=options.window,
            spool=self.spool / split.name,
            place=f"{options.dataset}: split {split.name}",
        )
        yield from self.planner.plan(split, tokenized)
        self.report.add(split.survey)
        on_survey(split.survey)

    # -- what is missing -> scores ---------------------------------------------------------------------

    def _score(self, split: SplitPlan, window: Window, on_progress: OnProgress) -> None:
        """Run the window's missing completions through the model and publish their scores as they come."""
        if not len(window.missing_keys):
            return
        model, attention = self._load_model()
        completions = missing_completions(window, self.truncation)
        keys, waiting = list(completions), []
        started = flushed = time.perf_counter()
        scored_before = self.report.scoring_s
        try:
            for progress in score_completions(model, list(completions.values()), attention, self.budget):
                self._check_finite(window, keys, list(completions.values()), progress.scores)
                waiting += [(keys[index], score) for index, score in progress.scores]
                self.report.model_tokens += progress.num_tokens
                self.report.scoring_s = scored_before + time.perf_counter() - started
                if time.perf_counter() - flushed >= FLUSH_S:
                    self._flush(waiting)
                    flushed = time.perf_counter()
                on_progress(self._progress(split, window, progress.total_tokens, len(waiting)))
            self._flush(waiting)
        except BaseException:  # Ctrl-C and SIGTERM too, be it in the midst of a flush: what is scored is kept
            self._flush(waiting)
            raise
        self.finished = (self.report.model_tokens, self.finished[1] + window.missing_tokens)

    def _progress(
        self, split: SplitPlan, window: Window, window_tokens: int, num_waiting: int
    ) -> ScoringProgress:
        """Rows run more tokens than were planned, for padding and no sharing: later windows are taken to run
        as many more.
        """
        totals = self.planner.totals
        known, planned = self.finished[0] + window_tokens, self.finished[1] + window.missing_tokens
        total_tokens = known + round((totals.missing_tokens - planned) * known / planned)
        num_scored = self.report.scored_now + num_waiting
        return ScoringProgress(
            split.survey.pair_set,
            self.report.model_tokens,
            total_tokens,
            totals.missing_pairs,
            num_scored,
            self.report.scoring_s,
        )

    def _check_finite(
        self,
        window: Window,
        keys: list[bytes],
        completions: list[Completion],
        scores: list[tuple[int, Score]],
    ) -> None:
        """Raise `ModelError` naming the row of a score that is no number; nothing of its batch is stored."""
        spoiled = [index for index, score in scores if not np.isfinite(score.token_logps).all()]
        if not spoiled:
            return
        culprits = [
            index for index in spoiled if self._is_spoiled_alone(completions[index])
        ]  # what is run beside it is spoiled with it
        rows = ", ".join(map(str, rows_of(window, keys[(culprits or spoiled)[0]], self.truncation)))
        is_half = self.dtype == torch.float16
        cause = "float16 overflows beyond 65,504" if is_half else "the weights may be damaged"
        raise ModelError(
            f"row {rows}{'' if culprits else ' or one that is scored beside it'}: a log-prob came out as "
            "NaN or infinite; "
            "nothing of this batch is stored.\n"
            f"Likely cause: {cause}. Try --dtype {'bfloat16 or ' if is_half else ''}float32."
        )

    def _is_spoiled_alone(self, completion: Completion) -> bool:
        model, attention = self._load_model()
        budget = Budget(self.budget.tokens, self.device, self.log)
        progress = score_completions(model, [completion], attention, budget)
        return any(not np.isfinite(score.token_logps).all() for step in progress for _, score in step.scores)

    def _flush(self, waiting: list[tuple[bytes, Score]]) -> None:
        if waiting:
            self.cache.publish_reference(self.identity, self._provenance())
            self.report.bytes_written += self.scores.publish(waiting)
            self.report.scored_now += len(waiting)
            waiting.clear()

    def _load_model(self) -> tuple[PreTrainedModel, AttentionChoice]:
        if self.loaded is None:
            options = self.options
            model = load_model(
                options.model,
                dtype=self.dtype,
                device=self.device,
                revision=options.revision,
                trust_remote_code=options.trust_remote_code,
                quantize=options.quantize,
            )
            use_fast_linear(model)
            attention = choose_attention(model, options.attention, max_length=options.max_length)
            self.report.attention = attention.name
            self.report.loaded_bytes = peak_bytes(self.device)
            self.budget = Budget(
                number_or_auto("--budget-tokens", options.budget_tokens), self.device, self.log
            )
            if attention.name == "rows" and options.attention == "auto":
                self.log(
                    f"{type(model).__name__} is run as plain padded rows, which is slower: "
                    f"{attention.reason}."
                )
            self.loaded = model, attention
        return self.loaded

    # -- scores -> pair set ----------------------------------------------------------------------------

    def _publish_pairs(self, split: SplitPlan) -> None:
        """Join the pairs with their scores and publish them, unless the very same pair set is there."""
        pair_set, digest = split.survey.pair_set, split.digest.hexdigest()
        self.report.pair_sets.append(pair_set)
        self.cache.publish_reference(
            self.identity, self._provenance()
        )  # unless it is there; `verify --repair` may have moved it aside
        if self.cache.holds_pairs(pair_set):
            old = self.cache.pairs(pair_set)
            if (old.reference_id, old.manifest.get("pairs_digest")) == (
                self.report.reference,
                digest,
            ) and old.is_complete():
                return
            self.log(
                f"pair set {pair_set} is replaced: it held {len(old)} pairs of reference "
                f"{old.reference_id[:12]}{self._what_changed(split, old)}."
            )
        writer = self.cache.write_pairs(self.name, split.name)
        for window in split.windows:
            pairs = pairs_of(window, self.truncation)
            scores = self.scores.fetch(np.concatenate([window.chosen_keys, window.rejected_keys]))
            both = zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)
            writer.add(
                [
                    ScoredPair(pair, chosen, rejected)
                    for pair, (chosen, rejected) in zip(pairs, both, strict=True)
                ]
            )
        writer.finish(self._manifest_details(split, digest))
        self.report.bytes_written += writer.bytes_written

    def _what_changed(self, split: SplitPlan, old: PairSet) -> str:
        """The fields of the identities that differ; under one reference, those of the tokenization."""
        if old.reference_id != self.report.reference:
            before, now = self.cache.read_reference(old.reference_id)["identity"], self.identity
        else:
            before, now = (
                old.manifest.get("tokenization", {}),
                self._manifest_details(split, "")["tokenization"],
            )
        differing = differing_fields(before, now)
        return f"; before and now differ in {'; '.join(differing)}" if differing else ""

    def _manifest_details(self, split: SplitPlan, digest: str) -> dict[str, Any]:
        options = self.options
        is_local = os.path.exists(options.dataset)
        return {
            "name": self.name,
            "split": split.name,
            "reference": self.report.reference,
            "pairs_digest": digest,
            "source": {
                "dataset": os.path.abspath(options.dataset) if is_local else options.dataset,
                "format": split.survey.data_format,
                "map": list(options.map),
                "ranked_pairs": options.ranked_pairs,
                "rows_read": split.survey.rows_read,
                "rows_dropped": {reason: finding.count for reason, finding in split.survey.dropped.items()},
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            "tokenization": {
                "tokenizer": _absolute(self.tokenizer_place),
                "tokenizer_sha256": data.tokenizer_digest(self.tokenizer),
                "chat_template": self.tokenizer.chat_template,
                "max_length": options.max_length,
                "truncation": options.truncation,
                "max_prompt_length": options.max_prompt_length,
            },
        }

    def _provenance(self) -> dict[str, Any]:
        options = self.options
        return provenance(
            options.model,
            revision=options.revision,
            device=self.device,
            attention=options.attention,
            tokenizer=self.tokenizer_place,
        )

    def _finish_report(self) -> PrecomputeReport:
        totals, report = self.planner.totals, self.report
        report.distinct_completions, report.already_cached = (
            totals.distinct_completions,
            totals.already_cached,
        )
        report.missing_tokens = totals.missing_tokens
        report.elapsed_s = time.perf_counter() - self.started
        report.pairs_per_s = report.pairs_kept / report.elapsed_s
        report.peak_bytes = peak_bytes(self.device)
        report.budget_tokens = self.budget.tokens if self.loaded else None
        if self.options.dry_run:
            return report
        recorded = self.cache.read_reference(report.reference)["provenance"]["model"]
        if os.path.isabs(recorded) and not os.path.isdir(recorded):
            report.start_from = _absolute(self.options.model)
        return report


def _absolute(location: str) -> str:
    return os.path.abspath(location) if os.path.isdir(location) else location
