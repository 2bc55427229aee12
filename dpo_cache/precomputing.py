"""data -> lm -> store: score the reference's log-probs of a data set, once.

read rows -> tokenize -> key -> skip what is stored -> score the rest -> publish scores -> publish pairs
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from dpo_cache import data
from dpo_cache.errors import DataError, ModelError, StorageError
from dpo_cache.lm.device import choose_device, choose_dtype, peak_bytes
from dpo_cache.lm.engine import Attention, choose_attention, score_completions
from dpo_cache.lm.identity import provenance, reference_identity
from dpo_cache.lm.load import check_causal, load_config, load_model
from dpo_cache.lm.scoring import default_budget
from dpo_cache.options import PrecomputeOptions, number_or_auto
from dpo_cache.store import Cache, ScoreIndex, completion_key, open_cache
from dpo_cache.store.cache import check_name
from dpo_cache.store.pairs import PairsDigest
from dpo_cache.types import Completion, Pair, Score, ScoredPair

WINDOW_ROWS = 16_384  # rows that are sorted, scored and joined at once: bounds the memory of host-side work
FLUSH_S = 20.0  # seconds of scoring that a crash can cost

Say = Callable[[str], None]
OnProgress = Callable[["ScoringProgress"], None]


@dataclass(frozen=True)
class ScoringProgress:
    """How far the scoring of one window is; tokens are those run through the model."""

    pair_set: str
    num_tokens: int
    total_tokens: int
    num_completions: int
    elapsed_s: float


@dataclass
class PrecomputeReport:
    """What `precompute` did; counts are sums over the splits."""

    pair_sets: list[str] = field(default_factory=list)
    cache: str = ""
    reference: str = ""
    attention: str | None = None  # None: no model was loaded
    rows_read: int = 0
    pairs_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rows_truncated: int = 0
    rows_moved_boundary: int = 0
    completions: int = 0
    distinct_completions: int = 0
    already_cached: int = 0
    scored_now: int = 0
    data_tokens: int = 0  # prompt + answer of every completion kept, as an unpadded batch would run them
    model_tokens: int = 0  # actually run
    elapsed_s: float = 0.0
    pairs_per_s: float = 0.0
    peak_bytes: int = 0
    bytes_written: int = 0


@dataclass
class _Split:
    """One tokenized split on its way into a pair set."""

    name: str
    data_format: str
    rows: Dataset
    dropped: Counter[str] = field(default_factory=Counter)


def precompute(
    model: str, dataset: str, cache: str, *, on_progress: OnProgress | None = None, say: Say | None = None, **options: Any
) -> PrecomputeReport:
    """Score what the cache lacks of the data set's completions and publish its pair sets.

    Keyword arguments are the fields of `PrecomputeOptions`. Only completions that no earlier run scored
    under the same reference are run through the model, and the model is loaded only if there are any.
    Scores are published as they come, at the latest every 20 seconds: a run that is killed is taken up
    where it was by running it again. The global random state is left alone.

    `on_progress` is called after every chunk; `say` gets each remark (default: the package's logger).
    Raises `DpoCacheError`; nothing that was published before is lost.
    """
    chosen = PrecomputeOptions(model=model, dataset=dataset, cache=cache, **options)
    return _Precompute(chosen, on_progress or (lambda _: None), say or logging.getLogger("dpo_cache").warning).run()


class _Precompute:
    """One run: its options, its reference, and the model once it is needed."""

    def __init__(self, options: PrecomputeOptions, on_progress: OnProgress, say: Say):
        self.options, self.on_progress, self.say = options, on_progress, say
        self.started = time.perf_counter()
        self.name = check_name(options.name or data.dataset_name(options.dataset))
        self.truncation = data.Truncation(options.max_length, options.truncation, options.max_prompt_length)
        self.cache: Cache = open_cache(options.cache, create=True)
        self.device = choose_device(options.device)
        self.report = PrecomputeReport(cache=str(self.cache))
        self.loaded: tuple[PreTrainedModel, Attention] | None = None

    def run(self) -> PrecomputeReport:
        self.config = load_config(self.options.model, revision=self.options.revision, trust_remote_code=self.options.trust_remote_code)
        check_causal(self.config, self.options.model)
        splits = self._read_splits()
        self._check_disk(splits)
        self.dtype = choose_dtype(self.options.dtype, self.device, getattr(self.config, "dtype", None))
        self.identity = reference_identity(self.options.model, self.config, self.dtype, revision=self.options.revision)
        self.report.reference = self.cache.publish_reference(self.identity, self._provenance())
        self.scores: ScoreIndex = self.cache.scores(self.report.reference)
        for split in splits:
            digest = self._score_split(split)
            self._publish_pairs(split, digest)
        self.report.elapsed_s = time.perf_counter() - self.started
        self.report.pairs_per_s = self.report.pairs_kept / self.report.elapsed_s
        self.report.peak_bytes = peak_bytes(self.device)
        return self.report

    # -- rows -> token ids -----------------------------------------------------------------------------

    def _read_splits(self) -> list[_Split]:
        """Every split read, checked and tokenized, before anything is scored or written."""
        options = self.options
        tables = data.read_dataset(options.dataset, options.split, options.limit)
        formats = {name: data.detect_format(table.column_names, table[0]) for name, table in tables.items()}
        for name, table in tables.items():
            check_name(name)
            data.check_rows(table, formats[name])
        self.tokenizer = data.load_tokenizer(
            options.tokenizer or options.model,
            revision=None if options.tokenizer else options.revision,
            chat_template=options.chat_template,
            trust_remote_code=options.trust_remote_code,
        )
        splits = [_Split(name, formats[name], data.tokenize_rows(table, formats[name], self.tokenizer)) for name, table in tables.items()]
        self.report.rows_read = sum(len(split.rows) for split in splits)
        return splits

    def _pairs(self, split: _Split, window: range) -> Iterator[tuple[Pair | data.Dropped, bool, bool]]:
        """Per row of the window: the pair or why there is none, whether it was cut, whether its boundary moved."""
        rows = split.rows.with_format("numpy")[window.start : window.stop]
        columns = zip(*(rows[name] for name in ("row", "prompt_ids", "chosen_ids", "rejected_ids", "moved_boundary")), strict=True)
        for row, prompt, chosen, rejected, moved in columns:
            prompt_ids, chosen_ids, rejected_ids = (np.asarray(values, np.uint32) for values in (prompt, chosen, rejected))
            pair, was_cut = data.make_pair(int(row), prompt_ids, chosen_ids, rejected_ids, self.truncation)
            yield pair, was_cut, bool(moved)

    def _windows(self, split: _Split) -> Iterator[range]:
        for start in range(0, len(split.rows), WINDOW_ROWS):
            yield range(start, min(start + WINDOW_ROWS, len(split.rows)))

    # -- token ids -> scores ---------------------------------------------------------------------------

    def _score_split(self, split: _Split) -> str:
        """Score what is missing, window by window. Returns the digest of the pairs."""
        digest, report, kept = PairsDigest(), self.report, 0
        seen: set[bytes] = set()
        for window in self._windows(split):
            completions: dict[bytes, Completion] = {}
            for pair, was_cut, moved in self._pairs(split, window):
                report.rows_truncated += was_cut
                report.rows_moved_boundary += moved
                if isinstance(pair, data.Dropped):
                    split.dropped[pair.reason] += 1
                    continue
                keys = completion_key(pair.chosen), completion_key(pair.rejected)
                completions.update(zip(keys, (pair.chosen, pair.rejected), strict=True))
                digest.add(pair.row, *keys)
                kept += 1
                report.data_tokens += len(pair.chosen.sequence_ids) + len(pair.rejected.sequence_ids)
            self._check_ids(completions)
            new = {key: completion for key, completion in completions.items() if key not in seen}
            seen.update(new)
            self._score_missing(split, new)
        if not kept:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in split.dropped.items())
            raise DataError(f"{self.options.dataset}: no row of split {split.name} makes a pair: {reasons}.")
        report.pairs_kept += kept
        report.completions += 2 * kept
        report.dropped.update(split.dropped)
        return digest.hexdigest()

    def _score_missing(self, split: _Split, completions: dict[bytes, Completion]) -> None:
        keys = list(completions)
        present = self.scores.contains(keys)
        self.report.distinct_completions += len(keys)
        self.report.already_cached += int(present.sum())
        missing = [key for key, there in zip(keys, present, strict=True) if not there]
        if not missing:
            return
        model, attention = self._load_model()
        budget = number_or_auto("--budget-tokens", self.options.budget_tokens) or default_budget(self.device)
        waiting: list[tuple[bytes, Score]] = []
        started = flushed = time.perf_counter()
        num_tokens = num_scored = 0
        try:
            for progress in score_completions(model, [completions[key] for key in missing], attention, budget):
                waiting.extend((missing[index], score) for index, score in progress.scores)
                num_tokens += progress.num_tokens
                num_scored += len(progress.scores)
                if time.perf_counter() - flushed >= FLUSH_S:
                    self._flush(waiting)
                    flushed = time.perf_counter()
                elapsed_s = time.perf_counter() - started
                self.on_progress(ScoringProgress(f"{self.name}/{split.name}", num_tokens, progress.total_tokens, num_scored, elapsed_s))
        finally:  # also on Ctrl-C: what is scored is kept
            self._flush(waiting)
            self.report.model_tokens += num_tokens

    def _flush(self, waiting: list[tuple[bytes, Score]]) -> None:
        if waiting:
            self.report.bytes_written += self.scores.publish(waiting)
            self.report.scored_now += len(waiting)
            waiting.clear()

    def _load_model(self) -> tuple[PreTrainedModel, Attention]:
        if self.loaded is None:
            options = self.options
            model = load_model(
                options.model, dtype=self.dtype, device=self.device, revision=options.revision, trust_remote_code=options.trust_remote_code
            )
            attention = choose_attention(model, options.attention, max_length=options.max_length)
            self.report.attention = attention.name
            if attention.name == "rows" and options.attention == "auto":
                self.say(f"{type(model).__name__} is run as plain padded rows, which is slower: {attention.reason}.")
            self.loaded = model, attention
        return self.loaded

    # -- scores -> pair set ----------------------------------------------------------------------------

    def _publish_pairs(self, split: _Split, digest: str) -> None:
        """Join the pairs with their scores and publish them, unless the very same pair set is there."""
        pair_set = f"{self.name}/{split.name}"
        self.report.pair_sets.append(pair_set)
        if pair_set in self.cache.pair_sets():
            old = self.cache.pairs(pair_set)
            if (old.reference_id, old.manifest["pairs_digest"]) == (self.report.reference, digest) and old.is_complete():
                return
            self.say(f"pair set {pair_set} is replaced: it held {len(old)} pairs of reference {old.reference_id[:12]}.")
        writer = self.cache.write_pairs(self.name, split.name)
        for window in self._windows(split):
            pairs = [pair for pair, _, _ in self._pairs(split, window) if isinstance(pair, Pair)]
            keys = [completion_key(completion) for pair in pairs for completion in (pair.chosen, pair.rejected)]
            scores = self.scores.fetch(keys)
            writer.add([ScoredPair(pair, *both) for pair, both in zip(pairs, zip(scores[::2], scores[1::2], strict=True), strict=True)])
        writer.finish(self._manifest_details(split, digest))
        self.report.bytes_written += writer.bytes_written

    def _manifest_details(self, split: _Split, digest: str) -> dict[str, Any]:
        options = self.options
        is_local = os.path.exists(options.dataset)
        return {
            "name": self.name,
            "split": split.name,
            "reference": self.report.reference,
            "pairs_digest": digest,
            "source": {
                "dataset": os.path.abspath(options.dataset) if is_local else options.dataset,
                "format": split.data_format,
                "rows_read": len(split.rows),
                "rows_dropped": dict(split.dropped),
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            "tokenization": {
                "tokenizer": _absolute(options.tokenizer or options.model),
                "tokenizer_sha256": data.tokenizer_digest(self.tokenizer),
                "chat_template": self.tokenizer.chat_template,
                "max_length": options.max_length,
                "truncation": options.truncation,
                "max_prompt_length": options.max_prompt_length,
            },
        }

    # -- checks ----------------------------------------------------------------------------------------

    def _provenance(self) -> dict[str, Any]:
        options = self.options
        return provenance(
            options.model, revision=options.revision, device=self.device, attention=options.attention, tokenizer=options.tokenizer or options.model
        )

    def _check_ids(self, completions: dict[bytes, Completion]) -> None:
        """Raise `ModelError` for ids or lengths that the model has no embedding for."""
        config: PreTrainedConfig = self.config.get_text_config()
        sequences = [completion.sequence_ids for completion in completions.values()]
        largest_id, longest = max((int(ids.max()) for ids in sequences), default=0), max(map(len, sequences), default=0)
        if largest_id >= config.vocab_size:
            raise ModelError(
                f"the tokenizer makes token id {largest_id}, but {self.options.model} has {config.vocab_size} embeddings.\n"
                "Give the model's own tokenizer with --tokenizer."
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions and longest > positions:
            raise ModelError(
                f"a sequence has {longest} tokens, but {self.options.model} was made for {positions} at most.\nRun with --max-length {positions}."
            )

    def _check_disk(self, splits: list[_Split]) -> None:
        """Raise `StorageError` before hours of scoring that could not be written."""
        free = self.cache.folder.free_bytes()
        if free is None:
            return
        num_tokens = sum(
            min(pc.sum(pc.list_value_length(split.rows.data.column(name))).as_py(), len(split.rows) * self.truncation.max_length)
            for split in splits
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        needed = 13 * num_tokens  # 4 bytes an id, 4 a log-prob twice (scores and pairs), and some slack
        if needed > free:
            raise StorageError(
                f"{self.cache}: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.\n"
                "Free some space, choose another --cache, or score less at once with --limit."
            )


def _absolute(location: str) -> str:
    return os.path.abspath(location) if os.path.isdir(location) else location
