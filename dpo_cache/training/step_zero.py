"""Step zero: a policy that starts as the reference must repeat its cached log-probs.

That needs no second model, and catches a wrong checkpoint, template, truncation, dtype or a stale cache. A
policy that is an adapter is the reference whenever its adapter is switched off, a resumed one too.

Where the two part, the pattern of the gaps along the answers tells what the cause may be: see `find_causes`.
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
from dpo_cache.types import TOKEN_TOLERANCES, Score, ScoredPair

# Gap per completion in nats that rounding explains: (absolute, relative to its log-prob), by dtype.
TOLERANCES = {"float32": (5e-3, 1e-5), "float16": (5e-2, 5e-3), "bfloat16": (0.5, 2e-2)}
UNKNOWN_DTYPE = "bfloat16"  # an imported reference may not say: the widest

MOST_COMPLETIONS = 1024  # that are looked at
FIRST_TOKENS = 3  # of an answer, where another template before it shows most
CLEARLY = 4.0  # times as large
FEW = 0.5  # share of the completions
QUANTIZED_GAP = 0.5  # mean nats a token that coarser numbers explain; other weights give whole nats


@dataclass(frozen=True)
class Expectation:
    """What is known beforehand of policy and reference."""

    policy_dtype: str
    reference_dtype: str | None
    is_reference: bool  # their identities say that they are one model
    differing: Sequence[str] = ()  # fields of their identities, else
    imported: str | None = (
        # name of a reference whose log-probs were made elsewhere: there is nothing to compare identities with
        None
    )
    is_default: bool = (
        False  # the policy starts from what the reference was loaded from, since no other was named
    )
    remarks: Sequence[str] = ()  # other differences that were found, such as of templates
    what: str = "the policy"

    @property
    def tolerance(self) -> tuple[float, float]:
        return max(TOLERANCES[self.reference_dtype or UNKNOWN_DTYPE], TOLERANCES[self.policy_dtype])

    @property
    def stops(self) -> bool:
        """Whether a gap stops the run under `auto`: where policy and reference should be one model."""
        return self.is_reference or (self.is_default and self.imported is None)


def expectation_of(policy: TrainedModel, data: TrainingPairs, options: TrainOptions) -> Expectation:
    """What is known of a policy at its start."""
    identity = data.reference["identity"]
    return Expectation(
        policy_dtype=str(rounding_dtype(policy.model)).removeprefix("torch.")
        if policy.precision == "fp32"
        else "bfloat16",
        reference_dtype=rounding_dtype_of(identity),
        is_reference=policy.is_reference,
        differing=policy.differing,
        imported=identity.get("imported"),
        is_default=options.model is None and options.quantize == "none",
        remarks=policy.remarks,
    )


def open_step_zero(
    policy: TrainedModel, data: TrainingPairs, options: TrainOptions, *, is_resumed: bool
) -> StepZero | None:
    """The check of the first log-probs; None for a resumed policy, which was trained before, or where it is
    off.
    """
    if is_resumed or options.step_zero == "off":
        return None
    return StepZero(expectation_of(policy, data, options), options.step_zero)


def open_base_check(policy: TrainedModel, data: TrainingPairs, options: TrainOptions) -> StepZero | None:
    """The check of a policy whose adapter was trained before: with it switched off, the policy is the
    reference.

    None where the base is not known to be the reference, or `open_step_zero` checks the same.
    """
    if options.step_zero == "off" or not policy.base_is_reference or policy.is_reference:
        return None
    known = expectation_of(policy, data, options)
    what = "the policy with its adapter switched off"
    return StepZero(replace(known, is_reference=True, differing=(), what=what), options.step_zero)


@dataclass
class StepZero:
    """Collects gaps between policy and cached reference until the first update; `mode` is strict, warn or
    auto.
    """

    expectation: Expectation
    mode: str = "auto"
    most: int = MOST_COMPLETIONS
    largest_gap: float = 0.0
    gaps: list[np.ndarray] = field(default_factory=list)  # of each completion, token by token; nats
    sums: list[tuple[float, float, float]] = field(default_factory=list)  # policy's, reference's, allowed gap
    partial: list[float] = field(default_factory=list)  # smallest gap to a sum over fewer tokens
    rows: list[int] = field(default_factory=list)

    def check_pairs(self, pairs: Sequence[ScoredPair], logps: CompletionLogps) -> None:
        """Compare the pairs' chosen, then rejected completions with the cache, until enough have been
        compared.
        """
        if not self.has_enough:
            tokens = logps.tokens_T.detach().float().cpu().split(logps.lengths)
            scores = [scored.ref_chosen for scored in pairs] + [scored.ref_rejected for scored in pairs]
            rows = [scored.pair.row for scored in pairs] * 2
            self.check([values.numpy() for values in tokens], scores, rows)

    def check(self, policy_logps: Sequence[np.ndarray], scores: Sequence[Score], rows: Sequence[int]) -> None:
        """Note the token log-probs of completions, the policy's beside the cached, and the rows that they
        come from.
        """
        absolute, relative = self.expectation.tolerance
        for tokens, score, row in zip(policy_logps, scores, rows, strict=True):
            exact = tokens.astype(np.float64)
            allowed = absolute + relative * abs(score.logps)
            gap = abs(float(exact.sum()) - score.logps)
            self.largest_gap = max(self.largest_gap, gap if np.isfinite(gap) else np.inf)
            self.sums.append((float(exact.sum()), score.logps, allowed))
            self.partial.append(float(np.abs(np.cumsum(exact)[:-1] - score.logps).min(initial=np.inf)))
            self.gaps.append(np.abs(exact - score.token_logps) if len(score.token_logps) else np.empty(0))
            self.rows.append(row)

    @property
    def has_enough(self) -> bool:
        """Whether the first batches have told what there is to tell."""
        return len(self.sums) >= self.most

    def begin_training(self) -> None:
        """After an evaluation: training pairs are looked at however many were evaluated on."""
        self.most = len(self.sums) + MOST_COMPLETIONS

    @property
    def beyond(self) -> list[int]:
        """The completions whose gap rounding does not explain."""
        return [
            place
            for place, (policy, cached, allowed) in enumerate(self.sums)
            if not abs(policy - cached) <= allowed
        ]

    def conclude(self) -> str:
        """One line for the log. Raises `StepZeroError` where the run must not go on."""
        self.stop_if_wrong()
        expected, beyond = self.expectation, self.beyond
        what = f"step zero: largest gap {self.largest_gap:.2g} nats over {len(self.sums)} completions"
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
        intended = not expected.is_reference and expected.imported is None
        meaning = (
            f"{expected.what} is another model than the reference"
            if intended
            else f"the values of the {whose} are not those of {expected.what}"
        )
        if intended:
            meaning += f": they differ in {'; '.join(expected.differing)}"
        causes = "" if intended and not expected.remarks else "\n" + self._likely(beyond)
        return f"{what}, {len(beyond)} of them beyond rounding; {meaning}.{causes}"

    def stop_if_wrong(self) -> None:
        """Raise `StepZeroError` where what was seen so far is enough to stop."""
        beyond = self.beyond
        if beyond and (self.mode == "strict" or (self.mode == "auto" and self.expectation.stops)):
            raise StepZeroError(self._failure(beyond))

    def _failure(self, beyond: list[int]) -> str:
        worst = max(beyond, key=lambda place: _excess(self.sums[place]))
        policy, cached, allowed = self.sums[worst]
        expected = self.expectation
        should = "is the reference" if expected.is_reference else "should start as the reference"
        return (
            f"step zero: {expected.what} {should}, but its log-prob of a completion of row "
            f"{self.rows[worst]} is {policy:.4f} "
            f"where the cache has {cached:.4f} (allowed gap {allowed:.2g} nats); {len(beyond)} of "
            f"{len(self.sums)} completions differ.\n"
            f"{self._likely(beyond)}\n"
            "Give the `model`, precision and pairs that belong together; `step_zero` warn goes on all the "
            "same."
        )

    def _likely(self, beyond: list[int]) -> str:
        return "Likely cause: " + "; or ".join(find_causes(self, beyond)) + "."


def find_causes(found: StepZero, beyond: Sequence[int]) -> list[str]:
    """What may have made the gaps, the known differences first; a guess from their pattern where nothing is
    known.

    - cache: some completions differ and the others agree to rounding: those values were changed, or come from
      elsewhere.
    - truncation: a cached sum is the policy's sum over fewer of the answer's tokens.
    - template: the first tokens of the answers differ more than what follows: another text stood before them.
    - dtype or quantization: all tokens differ a little: coarser numbers.
    - weights: all tokens differ by much.
    """
    expected = found.expectation
    causes = [f"{_kind_of(line)} ({line})" for line in expected.differing]
    causes += list(expected.remarks)
    if not expected.differing:  # what else is known may be there and not matter: the pattern may say more
        causes.append(_guess(found, beyond))
    if expected.reference_dtype not in (None, expected.policy_dtype):
        causes.append(
            f"dtype (the reference was scored in {expected.reference_dtype}, the policy runs in "
            f"{expected.policy_dtype})"
        )
    return causes


def _kind_of(line: str) -> str:
    """Which of the usual suspects a differing field of two identities is."""
    name = line.partition(":")[0].partition(".")[0]
    return {"config": "configuration", "scoring": "format of scores"}.get(name, name)


def _guess(found: StepZero, beyond: Sequence[int]) -> str:
    partial = [found.partial[place] <= found.sums[place][2] for place in beyond]
    if np.mean(partial) > FEW:
        return "truncation: the cached sums are of fewer tokens than the answers have"
    if len(beyond) <= FEW * len(found.sums):
        rows = sorted({found.rows[place] for place in beyond})
        shown = shown_rows(rows)
        return (
            f"cache: the values of row {shown} alone differ, so they were changed or come from another "
            "model; `dpo-cache verify` looks into it"
        )
    gaps = [found.gaps[place] for place in beyond if len(found.gaps[place])]
    if not gaps:
        return "weights, template or truncation: the cache has no token log-probs that would tell"
    first = float(np.mean(np.concatenate([gap[:FIRST_TOKENS] for gap in gaps])))
    later = np.concatenate([gap[2 * FIRST_TOKENS :] for gap in gaps])
    everywhere = float(np.mean(np.concatenate(gaps)))
    if len(later) and first > CLEARLY * float(np.mean(later)) and first > TOKEN_TOLERANCES["bfloat16"][1]:
        gaps_of_both = f"by {first:.2g} nats each, later ones by {np.mean(later):.2g}"
        return (
            f"template: the first tokens of the answers differ {gaps_of_both}: another text stood before them"
        )
    if everywhere < QUANTIZED_GAP:
        return f"dtype or quantization: all tokens differ a little, by {everywhere:.2g} nats on average"
    return (
        f"weights: all tokens differ by much, by {everywhere:.2g} nats on average: the cached values "
        "are of another checkpoint"
    )


def _excess(sums: tuple[float, float, float]) -> float:
    policy, cached, allowed = sums
    gap = abs(policy - cached) - allowed
    return gap if np.isfinite(gap) else np.inf
