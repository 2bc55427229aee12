"""Step zero: a policy that starts as the reference must repeat its cached log-probs.

That needs no second model, and catches a wrong checkpoint, template, truncation, dtype or a stale cache.
"""

from __future__ import annotations

import torch

from dpo_cache.errors import StepZeroError

# Gap per completion in nats that rounding explains: (absolute, relative to its log-prob), by dtype.
TOLERANCES = {"float32": (5e-3, 1e-5), "float16": (5e-2, 5e-3), "bfloat16": (0.5, 2e-2)}
UNKNOWN_DTYPE = "bfloat16"  # an imported reference may not say: the widest


class StepZero:
    """Collects gaps between policy and cached reference until the first update.

    `imported` is the name of a reference whose log-probs were made elsewhere: whether the policy starts as it
    is then seen from the gaps, and a run is never stopped for them.
    """

    def __init__(self, *, same_model: bool, reference_dtype: str | None, policy_dtype: str, imported: str | None = None):
        self.same_model, self.imported = same_model, imported
        self.absolute, self.relative = max(TOLERANCES[reference_dtype or UNKNOWN_DTYPE], TOLERANCES[policy_dtype])
        self.largest_gap = 0.0
        self.num_completions = self.num_beyond = 0

    def check(self, policy_logps: torch.Tensor, reference_logps: torch.Tensor) -> None:
        """Note the gaps; raise `StepZeroError` where one is too large though policy and reference are one model."""
        policy_logps = policy_logps.detach()
        gaps = (policy_logps - reference_logps).abs()
        self.num_completions += len(gaps)
        self.largest_gap = max(self.largest_gap, float(gaps.max()))
        allowed = self.absolute + self.relative * reference_logps.abs()
        self.num_beyond += int((~(gaps <= allowed)).sum())
        if self.same_model and not bool((gaps <= allowed).all()):
            worst = int((gaps - allowed).nan_to_num(nan=torch.inf).argmax())
            raise StepZeroError(
                f"step zero: the policy is the reference, but its log-prob of a completion is {float(policy_logps[worst]):.4f} "
                f"where the cache has {float(reference_logps[worst]):.4f} (allowed gap {float(allowed[worst]):.2g} nats).\n"
                "The cache is stale or was made on a faulty machine: score again into a new --cache, and compare."
            )

    def describe(self) -> str:
        """One line for the log."""
        what = f"step zero: largest gap {self.largest_gap:.2g} nats over {self.num_completions} completions"
        if self.imported is not None:
            return f"{what}; {self._describe_imported()}"
        return f"{what}; the policy is the reference." if self.same_model else f"{what}; the policy is another model than the reference."

    def _describe_imported(self) -> str:
        if not self.num_beyond:
            return f"within rounding: the policy starts as the model of the imported reference {self.imported!r}."
        return (
            f"{self.num_beyond} beyond rounding: the policy is not what the imported reference {self.imported!r} was made with, or its "
            "values come from another template, truncation or tokenizer, or are no sums."
        )
