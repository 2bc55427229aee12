"""Step zero: a policy that starts as the reference must reproduce its cached log-probs.

The check needs no second model, and catches a wrong checkpoint, template, truncation, dtype or a stale cache.
A policy with an adapter is the reference whenever the adapter is switched off, in a resumed run too.

If the log-probs differ, the pattern of the gaps along the answers hints at the cause: see `find_causes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dpo_cache.errors import StepZeroError, shown_rows
from dpo_cache.lm.model.quantization import rounding_dtype, rounding_dtype_of
from dpo_cache.lm.policy import CompletionLogps
from dpo_cache.options.train import TrainOptions
from dpo_cache.training.inputs import TrainedModel, TrainingPairs
from dpo_cache.types import TOKEN_TOLERANCES, UNKNOWN_DTYPE, GapSums, Score, ScoredPair

# Gap per completion, in nats, that rounding explains: (absolute, relative to its log-prob), by dtype.
TOLERANCES = {"float32": (5e-3, 1e-5), "float16": (5e-2, 5e-3), "bfloat16": (0.5, 2e-2)}

MOST_COMPLETIONS = 1024  # completions that are compared
FIRST_TOKENS = 3  # first tokens of an answer, which differ most if its template is another
CLEARLY = 4.0  # a mean gap that is larger by this factor is clearly larger
FEW = 0.5  # largest share of the completions that counts as few
ADVICE = "Give the `model`, precision and pairs that belong together; `step_zero` warn only logs the gap."
QUANTIZED_GAP = 0.5  # mean nats a token that a coarser dtype explains; other weights give whole nats


@dataclass(frozen=True)
class Expectation:
    """The known facts about policy and reference before their log-probs are compared."""

    policy_dtype: str
    reference_dtype: str | None
    is_reference: bool  # True if their identities are equal
    differing: Sequence[str] = ()  # otherwise, the fields in which their identities differ
    imported: str | None = None  # name of an imported reference, which has no identity to compare with
    is_named: bool = False  # True if the import named the policy's model as its source
    is_default: bool = False  # True if no model was named: the policy starts from the reference's checkpoint
    remarks: Sequence[str] = ()  # other known differences, for example between templates
    what: str = "the policy"

    @property
    def tolerance(self) -> tuple[float, float]:
        return TOLERANCES[self.dtype]

    @property
    def dtype(self) -> str:
        """The coarser of the two dtypes."""
        return max(self.reference_dtype or UNKNOWN_DTYPE, self.policy_dtype, key=TOLERANCES.__getitem__)

    @property
    def stops(self) -> bool:
        """Return whether a gap stops the run under `auto`: policy and reference should be one model."""
        return self.is_reference or self.is_named or (self.is_default and self.imported is None)


def expectation_of(policy: TrainedModel, data: TrainingPairs, options: TrainOptions) -> Expectation:
    """The known facts about a policy at its start."""
    identity, policy_dtype = data.reference["identity"], "bfloat16"
    if policy.precision == "fp32":
        policy_dtype = str(rounding_dtype(policy.model)).removeprefix("torch.")
    return Expectation(
        policy_dtype=policy_dtype,
        reference_dtype=rounding_dtype_of(identity),
        is_reference=policy.origin.is_reference,
        differing=policy.origin.differing,
        imported=identity.get("imported"),
        is_named=policy.origin.is_named,
        is_default=options.model is None and options.quantize == "none",
        remarks=policy.remarks,
    )


def open_step_zero(
    policy: TrainedModel, data: TrainingPairs, options: TrainOptions, *, is_resumed: bool
) -> StepZero | None:
    """The check of the first log-probs; None if it is off, or if the policy was trained before."""
    if is_resumed or options.step_zero == "off":
        return None
    return StepZero(expectation_of(policy, data, options), options.step_zero)


def open_base_check(policy: TrainedModel, data: TrainingPairs, options: TrainOptions) -> StepZero | None:
    """The check of a trained adapter's base: with the adapter switched off, the policy is the reference.

    None if the base is not known to be the reference, or if `open_step_zero` checks the same.
    """
    if options.step_zero == "off" or not policy.base_is_reference or policy.origin.is_reference:
        return None
    known = expectation_of(policy, data, options)
    what = "the policy with its adapter switched off"
    return StepZero(replace(known, is_reference=True, differing=(), what=what), options.step_zero)


@dataclass(frozen=True)
class Compared:
    """The log-prob of a completion under the policy, compared with the cached one; in nats."""

    row: int  # row of the data
    policy: float
    cached: float
    allowed: float  # the gap that rounding explains
    token_gaps: np.ndarray  # signed; empty if the cache has only the sum
    cached_tokens: np.ndarray  # the cache's log-probs of the same tokens
    partial_gap: float  # the smallest gap between the cached sum and the policy's sum over fewer tokens

    @property
    def gap(self) -> float:
        gap = abs(self.policy - self.cached)
        return gap if np.isfinite(gap) else np.inf


@dataclass
class StepZero:
    """Compares policy and cached reference until the first update; `mode` is strict, warn or auto."""

    expectation: Expectation
    mode: str = "auto"
    most: int = MOST_COMPLETIONS
    compared: list[Compared] = field(default_factory=list)

    def check_pairs(self, pairs: Sequence[ScoredPair], logps: CompletionLogps) -> None:
        """Compare the pairs' chosen, then rejected completions with the cache, until `most` are compared."""
        if len(self.compared) < self.most:
            tokens = logps.tokens_T.detach().float().cpu().split(logps.lengths)
            scores = [scored.ref_chosen for scored in pairs] + [scored.ref_rejected for scored in pairs]
            rows = [scored.pair.row for scored in pairs] * 2
            self.check([values.numpy() for values in tokens], scores, rows)

    def check(self, policy_logps: Sequence[np.ndarray], scores: Sequence[Score], rows: Sequence[int]) -> None:
        """Compare the policy's token log-probs of completions with the cached scores; `rows` are those of the
        data.
        """
        absolute, relative = self.expectation.tolerance
        for tokens, score, row in zip(policy_logps, scores, rows, strict=True):
            exact = tokens.astype(np.float64)
            self.compared.append(
                Compared(
                    row,
                    policy=float(exact.sum()),
                    cached=score.logps,
                    allowed=absolute + relative * abs(score.logps),
                    token_gaps=exact - score.token_logps if len(score.token_logps) else np.empty(0),
                    cached_tokens=score.token_logps,
                    partial_gap=float(np.abs(np.cumsum(exact)[:-1] - score.logps).min(initial=np.inf)),
                )
            )

    def begin_training(self) -> None:
        """After an evaluation, allow comparing training pairs as well, however many evaluation pairs were
        compared.
        """
        self.most = len(self.compared) + MOST_COMPLETIONS

    @property
    def largest_gap(self) -> float:
        return max((completion.gap for completion in self.compared), default=0.0)

    @property
    def beyond(self) -> list[Compared]:
        """The completions whose gap rounding does not explain; all of them if their tokens differ too much
        together.
        """
        beyond = [completion for completion in self.compared if completion.gap > completion.allowed]
        return beyond or (self.compared if self.noise else [])

    @property
    def noise(self) -> str:
        """The difference over the tokens of all completions that rounding does not explain, in words; usually
        empty.
        """
        compared = [completion for completion in self.compared if len(completion.token_gaps)]
        if self.expectation.imported is not None and not (
            self.expectation.is_named and any(map(_has_more_than_16_bits, compared))
        ):
            return ""  # another model, or values that another program rounded
        sums = GapSums()
        for completion in compared:
            sums.add(completion.token_gaps, completion.cached_tokens)
        return sums.problem(self.expectation.dtype)

    def conclude(self) -> str:
        """The result as one line for the log. Raises `StepZeroError` if the run must stop."""
        self.stop_if_wrong()
        expected, beyond = self.expectation, self.beyond
        what = f"step zero: largest gap {self.largest_gap:.2g} nats over {len(self.compared)} completions"
        if not beyond:
            if expected.imported is not None:
                return (
                    f"{what}; within rounding: {expected.what} starts as the model of the imported "
                    f"reference {expected.imported!r}."
                )
            if expected.is_reference:
                return f"{what}; {expected.what} is the reference."
            differing = "; ".join(expected.differing)
            return (
                f"{what}, within rounding, though {expected.what} is another model than the reference: "
                f"they differ in {differing}."
            )
        whose = "cache" if expected.imported is None else f"imported reference {expected.imported!r}"
        meaning = f"the values of the {whose} are not those of {expected.what}"
        is_intended = not expected.is_reference and expected.imported is None
        if is_intended:
            meaning = (
                f"{expected.what} is another model than the reference: they differ in "
                f"{'; '.join(expected.differing)}"
            )
        causes = "" if is_intended and not expected.remarks else "\n" + self._likely(beyond)
        return f"{what}, {len(beyond)} of them beyond rounding; {meaning}.{causes}"

    def stop_if_wrong(self) -> None:
        """Raise `StepZeroError` if the completions compared so far are a reason to stop."""
        beyond = self.beyond
        if beyond and (self.mode == "strict" or (self.mode == "auto" and self.expectation.stops)):
            raise StepZeroError(self._failure(beyond))

    def _failure(self, beyond: list[Compared]) -> str:
        worst = max(beyond, key=lambda completion: completion.gap - completion.allowed)
        expected = self.expectation
        should = "is the reference" if expected.is_reference else "should start as the reference"
        if worst.gap <= worst.allowed:
            return (
                f"step zero: {expected.what} {should}, but its token log-probs differ from the cache's by "
                f"{self.noise}, over {len(self.compared)} completions.\n{self._likely(beyond)}\n{ADVICE}"
            )
        return (
            f"step zero: {expected.what} {should}, but its log-prob of a completion of row {worst.row} is "
            f"{worst.policy:.4f} where the cache has {worst.cached:.4f} (allowed gap {worst.allowed:.2g} "
            f"nats); {len(beyond)} of {len(self.compared)} completions differ.\n"
            f"{self._likely(beyond)}\n{ADVICE}"
        )

    def _likely(self, beyond: list[Compared]) -> str:
        causes = find_causes(self.expectation, beyond, len(self.compared))
        return f"Likely cause: {'; or '.join(causes)}."


def _has_more_than_16_bits(completion: Compared) -> bool:
    """Return whether the cached log-probs were not rounded to a dtype of 16 bits. A log-softmax in such a
    dtype changes each log-prob by up to 0.016 nats at -5, even if the models are the same.
    """
    values = completion.cached_tokens.astype(np.float32)
    is_bfloat16 = not (values.view(np.uint32) & 0xFFFF).any()
    return not is_bfloat16 and not np.array_equal(values.astype(np.float16).astype(np.float32), values)


def find_causes(expected: Expectation, beyond: Sequence[Compared], num_compared: int) -> list[str]:
    """Possible causes of the gaps `beyond` rounding: the known differences, or a guess from the pattern.

    - cache: some completions differ and the others agree to rounding: those values were changed, or come from
      elsewhere.
    - truncation: a cached sum is the policy's sum over fewer of the answer's tokens.
    - template: the first tokens of the answers differ more than the others: another text preceded them.
    - dtype or quantization: all tokens differ a little: a coarser dtype.
    - weights: all tokens differ by much.
    """
    causes = [f"{_kind_of(line)} ({line})" for line in expected.differing]
    causes += list(expected.remarks)
    if not expected.differing:  # the remarks need not be the cause
        causes.append(_guess(beyond, num_compared))
    if expected.reference_dtype not in (None, expected.policy_dtype):
        causes.append(
            f"dtype (the reference was scored in {expected.reference_dtype}, the policy runs in "
            f"{expected.policy_dtype})"
        )
    return causes


def _kind_of(line: str) -> str:
    """The usual name of a differing field of two identities."""
    name = line.partition(":")[0].partition(".")[0]
    return {"config": "configuration", "scoring": "format of scores"}.get(name, name)


def _guess(beyond: Sequence[Compared], num_compared: int) -> str:
    if np.mean([completion.partial_gap <= completion.allowed for completion in beyond]) > FEW:
        return "truncation: the cached sums are of fewer tokens than the answers have"
    if len(beyond) <= FEW * num_compared:
        rows = shown_rows(sorted({completion.row for completion in beyond}))
        return (
            f"cache: only the values of row {rows} differ, so they were changed or come from another model; "
            "`dpo-cache verify` checks them"
        )
    gaps = [np.abs(completion.token_gaps) for completion in beyond if len(completion.token_gaps)]
    if not gaps:
        return "weights, template or truncation: the cache has no token log-probs to distinguish them"
    first = float(np.mean(np.concatenate([gap[:FIRST_TOKENS] for gap in gaps])))
    later = np.concatenate([gap[2 * FIRST_TOKENS :] for gap in gaps])
    everywhere = float(np.mean(np.concatenate(gaps)))
    if len(later) and first > CLEARLY * float(np.mean(later)) and first > TOKEN_TOLERANCES["bfloat16"][1]:
        return (
            f"template: the first tokens of the answers differ by {first:.2g} nats each, later ones by "
            f"{np.mean(later):.2g}: another text preceded them"
        )
    if everywhere < QUANTIZED_GAP:
        return f"dtype or quantization: all tokens differ a little, by {everywhere:.2g} nats on average"
    return (
        f"weights: all tokens differ by much, by {everywhere:.2g} nats on average: the cached values "
        "are of another checkpoint"
    )
