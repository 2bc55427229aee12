"""A run audits itself: it scores some of its completions a second time, one by one, by the model's own
forward.

The longest completion and a first sample are audited before any score is published: they are scored twice
beforehand, each way. Later, the scores of chosen completions are compared just before they are published.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dpo_cache.errors import ModelError, shown_rows
from dpo_cache.log import Log
from dpo_cache.options.precompute import audit_interval
from dpo_cache.precomputing.sampling import Sampler
from dpo_cache.precomputing.units import Scored, Unit
from dpo_cache.precomputing.windows import Entry
from dpo_cache.store.format.documents import Document
from dpo_cache.store.upkeep.run_record import RunRecord
from dpo_cache.types import TOKEN_TOLERANCES, Completion, GapSums

if TYPE_CHECKING:
    from dpo_cache.lm.runner import Runner  # imports the code that runs models

FIRST_SAMPLE = 8  # completions that are audited, with the longest, before any score is published


@dataclass
class AuditTotals:
    """Totals of the completions audited so far; gaps in nats a token."""

    completions: int = 0
    tokens: int = 0
    largest_gap: float = 0.0
    mean_gap: float = 0.0  # absolute
    sums: GapSums = field(default_factory=GapSums)
    too_long: int = 0  # completions that were left out: their own forward does not fit into memory
    elapsed_s: float = 0.0

    def add(self, gaps_N: np.ndarray, logps_N: np.ndarray) -> None:
        """Add the gaps of a completion's tokens, and their log-probs."""
        self.sums.add(gaps_N, logps_N)
        sizes_N = np.abs(gaps_N.astype(np.float64))
        sums = self.mean_gap * self.tokens + float(sizes_N.sum())
        self.completions += 1
        self.tokens += len(sizes_N)
        self.mean_gap = sums / self.tokens
        self.largest_gap = max(self.largest_gap, float(sizes_N.max()))

    def plus(self, other: AuditTotals) -> AuditTotals:
        """The totals of both."""
        tokens = self.tokens + other.tokens
        gaps = self.mean_gap * self.tokens + other.mean_gap * other.tokens
        return AuditTotals(
            self.completions + other.completions,
            tokens,
            max(self.largest_gap, other.largest_gap),
            gaps / max(1, tokens),
            self.sums.plus(other.sums),
            self.too_long + other.too_long,
            self.elapsed_s + other.elapsed_s,
        )

    def as_document(self) -> Document:
        """The member `audit` of a manifest."""
        return {
            "completions": self.completions,
            "tokens": self.tokens,
            "largest_gap": self.largest_gap,
            "mean_gap": self.mean_gap,
        }


class AuditError(ModelError):
    """Scores differ from the model's own forward. `problem` and `advice` leave out the sentence on withdrawn
    files.
    """

    def __init__(self, problem: str, withdrawn: str, advice: str):
        super().__init__(f"{problem}\n{withdrawn} {advice}")
        self.problem, self.advice = problem, advice


@dataclass(frozen=True)
class OwnLogps:
    """Log-probs of a completion by the model's own forward."""

    places_N: np.ndarray  # positions, within the completion, of the tokens that are compared
    logps_N: np.ndarray  # float32, nats


@dataclass
class Audit:
    """Audits the scores of a run; `totals` counts those that agreed."""

    sampler: Sampler
    record: RunRecord
    log: Log
    totals: AuditTotals = field(default_factory=AuditTotals)
    _runner: Runner | None = None  # None before the first unit
    _sample: dict[bytes, Entry] = field(default_factory=dict)  # chosen completions without published scores
    _own: dict[bytes, OwnLogps | None] = field(default_factory=dict)  # for some of `_sample`; None: too long
    _failure: AuditError | None = None

    def begin(self, unit: Unit, runner: Runner, longest: Sequence[Entry]) -> None:
        """Choose the sample of a unit. In the first one, audit the run's longest completions and the first
        ones of the sample before any score is published. Raises `ModelError`.
        """
        entries = list(zip(unit.keys, unit.completions, unit.rows, strict=True))
        chosen = [entries[place] for place in self.sampler.choose(unit)]
        is_first, self._runner = self._runner is None, runner
        self._sample |= {entry[0]: entry for entry in chosen}
        if is_first:
            with self._timed():
                self._audit_first({entry[0]: entry for entry in [*longest, *chosen[:FIRST_SAMPLE]]})

    def check(self, scored: Sequence[Scored]) -> None:
        """Compare the scores that were chosen, before they are published.

        Raises `ModelError` where one differs from the model's own forward; the record then states that all
        files of the run are to be withdrawn.
        """
        if self._failure:
            raise self._failure
        chosen = {key: score.token_logps for key, score in scored if key in self._sample}
        if not chosen:
            return
        with self._timed():
            self.record.begin_audit()
            gaps = self._compare(chosen)
            sums = replace(self.totals.sums)
            for gaps_N, logps_N in gaps:
                sums.add(gaps_N, logps_N)
            if problem := sums.problem(self._dtype):
                self._fail(list(chosen), f"the tokens of all audited completions differ by {problem}")
            self.record.end_audit()
        for key in chosen:
            del self._sample[key]
            if self._own.pop(key) is None:
                self.totals.too_long += 1
        for gaps_N, logps_N in gaps:
            self.totals.add(gaps_N, logps_N)

    def _audit_first(self, entries: dict[bytes, Entry]) -> None:
        """Score these completions both as the run does and by the model's own forward, and compare them. The
        log-probs of the forward are kept.
        """
        from dpo_cache.lm.budget import Budget

        assert self._runner is not None
        self._sample |= entries
        keys, completions, rows = zip(*entries.values(), strict=True)
        budget = Budget(self._runner.budget.tokens, self._runner.model.device, self.log)
        steps = replace(self._runner, budget=budget).score(completions, rows_of=rows.__getitem__)
        self._compare({keys[place]: score.token_logps for step in steps for place, score in step.scores})

    def _compare(self, chosen: dict[bytes, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Gaps to the log-probs of the model's own forward, and those log-probs. Raises `ModelError` where a
        completion has gaps beyond rounding.
        """
        assert self._runner is not None
        gaps: list[tuple[np.ndarray, np.ndarray]] = []
        wrong: dict[bytes, float] = {}
        if self._runner.layer_major is not None:
            self._run_together([key for key in chosen if key not in self._own])
        for key, token_logps in chosen.items():
            if key not in self._own:
                self._own[key] = self._run_own(self._sample[key])
            own = self._own[key]
            if own is not None:
                gaps_N = token_logps[own.places_N].astype(np.float64) - own.logps_N
                gaps.append((gaps_N, own.logps_N))
                if is_beyond_rounding(gaps_N, self._dtype):
                    wrong[key] = float(np.abs(gaps_N).max())
        if wrong:
            self._fail(
                list(wrong),
                f"by up to {max(wrong.values()):.2g} nats a token, in {len(wrong)} of {len(gaps)} audited "
                f"completions, where rounding in {self._dtype} explains "
                f"{TOKEN_TOLERANCES[self._dtype][0]:g}",
            )
        return gaps

    def _run_together(self, keys: Sequence[bytes]) -> None:
        """Run all completions by the model's own forward at once, so that streamed weights are read once."""
        wanted = {key: self._wanted(self._sample[key][1]) for key in keys}
        fitting = {key: one for key, one in wanted.items() if one is not None}
        if not fitting:
            return
        assert self._runner is not None
        with self._unless_out_of_memory():  # out of memory: they are run one by one later
            logps = self._runner.own_logps([*fitting.values()])
            for (key, (_, places_N)), logps_N in zip(fitting.items(), logps, strict=True):
                self._own[key] = OwnLogps(places_N, logps_N.numpy())

    def _run_own(self, entry: Entry) -> OwnLogps | None:
        """Log-probs of the completion's tokens, or of a sample spread over it if all logits take too much
        memory.
        """
        assert self._runner is not None
        wanted = self._wanted(entry[1])
        if wanted is not None:
            with self._unless_out_of_memory():
                (logps_N,) = self._runner.own_logps([wanted])
                return OwnLogps(wanted[1], logps_N.numpy())
        self.log(
            f"the audit leaves out a completion of row {shown_rows(entry[2])}: the model's own forward of "
            f"its {len(entry[1]):,} tokens does not fit into memory."
        )
        return None

    def _wanted(self, completion: Completion) -> tuple[Completion, np.ndarray] | None:
        """The completion and the places of its tokens to compare; None if it does not fit into memory."""
        from dpo_cache.lm import own_forward

        assert self._runner is not None
        model, original = self._runner.model, self._runner.attention.original
        if not own_forward.fits_into_memory(model, len(completion), original):
            return None
        num_places = min(completion.num_tokens, own_forward.most_places(model))
        return completion, np.linspace(0, completion.num_tokens - 1, num_places).round().astype(np.int64)

    @contextmanager
    def _unless_out_of_memory(self) -> Iterator[None]:
        """Leave the block without an error if memory runs out."""
        from dpo_cache.lm.budget import is_out_of_memory

        assert self._runner is not None
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error, self._runner.model.device):
                raise

    def _fail(self, wrong: Sequence[bytes], how: str) -> None:
        """Withdraw all that the run published, and raise `ModelError`."""
        assert self._runner is not None
        rows = sorted({row for key in wrong for row in self._sample[key][2]})
        attention = self._runner.attention.name
        advice = (
            "Run again with `attention` rows, and report the model."
            if attention == "forest"
            else "This model cannot be scored; report it, with its name and the row."
        )
        self._failure = AuditError(
            f"{self._runner.name}, run as {attention}, gives other log-probs for row {shown_rows(rows)} than "
            f"its own forward on that row by itself: {how}.",
            withdraw(self.record),
            advice,
        )
        raise self._failure

    @property
    def _dtype(self) -> str:
        from dpo_cache.lm.model.quantization import rounding_dtype

        assert self._runner is not None
        return str(rounding_dtype(self._runner.model)).removeprefix("torch.")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.totals.elapsed_s += time.perf_counter() - started


def open_audit(option: str, record: RunRecord, log: Log) -> Audit | None:
    """The audit for this value of the option `audit`; None for off."""
    interval = audit_interval(option)
    return None if interval is None else Audit(Sampler(interval), record, log)


def withdraw(record: RunRecord) -> str:
    """Record that all files of the run are to be withdrawn. Returns a sentence with their number."""
    shards, pair_sets = record.fail()
    if not shards and not pair_sets:
        return "Nothing was published."
    lost = (
        f" {record.num_lost} of the score files were not found: an older version of `dpo-cache compact` or "
        "`gc` may have copied them into other files. If one ran meanwhile, remove the reference with "
        "`dpo-cache rm`, too."
    )
    return (
        f"The {shards} score files and {pair_sets} pair sets that this run had published are withdrawn."
        f"{lost if record.num_lost else ''}"
    )


def is_beyond_rounding(gaps_N: np.ndarray, dtype: str) -> bool:
    """Return whether gaps between two ways to compute one completion's token log-probs are more than
    rounding.
    """
    largest, mean = TOKEN_TOLERANCES[dtype]
    sizes_N = np.abs(gaps_N)
    return not (sizes_N.max() <= largest and sizes_N.mean() <= mean)  # NaN is beyond
