"""Checks on one short pair that recomputed activations give the same gradient as kept ones, and that a
kernel of the forest's attention gives the same gradient as fused attention, segment by segment.

A model's code may do something in its forward pass that a second pass does not repeat, such as changing a
tensor in place or keeping a value for a later layer. Then the loss is right, but the gradient is wrong. The
self-check has compared a kernel's log-probs, but has not run its backward pass, or mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.check_logps import FAILURES
from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.forest.kernels import SEGMENTS, kernels_of
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.lm.sharded import ShardedModel
from dpo_cache.log import Log, phase
from dpo_cache.training.ranks import Ranks

# Largest gap between two gradients of a parameter that rounding explains, relative to its norm, and relative
# to that of all parameters (for gradients that are only rounding): in float32, and in 16 bits.
TOLERANCES = {"fp32": (1e-3, 1e-5), "16 bits": (5e-2, 1e-3)}
# The same between two kernels in 16 bits, which round differently: up to 0.09 of a norm on tiny models.
TOLERANCES_OF_KERNELS = {**TOLERANCES, "16 bits": (0.3, 1e-2)}


@dataclass
class Sketch:
    """The numbers of a parameter's gradient that are compared: its norm, and its sums over all dimensions
    but one.
    """

    norm: float
    sums: torch.Tensor

    def gap(self, other: Sketch) -> float:
        return float((self.sums - other.sums).norm())


@dataclass
class GradientCheck:
    """Compares modes of recomputation on a pair of made-up answers. Afterwards no parameter has a gradient,
    not even one that existed before. All ranks find the same problems.
    """

    policy: PolicyModel
    recomputation: Recomputation
    ranks: Ranks = field(default_factory=Ranks)
    _problems: dict[str, str] = field(default_factory=dict)

    @phase("self-check: comparing gradients")
    def problem(self, mode: str) -> str:
        """A description of how the mode's gradient differs from that of *none*; empty if it is equal, or if
        memory does not suffice for the pair.
        """
        if mode == "none" or not self.recomputation.num_layers:
            return ""
        if mode not in self._problems:
            try:
                problem = self._compare(self._gradient(mode))
            except RuntimeError as error:
                problem = self._failure(error)
            self._problems[mode] = self.ranks.first_problem(problem)
        return self._problems[mode]

    @phase("self-check: comparing gradients")
    def problem_of_kernel(self, kernel: str) -> str:
        """A description of how this kernel's gradient differs from that of the policy's own; empty if it is
        equal, or if memory does not suffice for the pair.
        """
        attention = replace(self.policy.attention, kernel=kernel)
        sharded = self.policy.sharded
        other = PolicyModel(self.policy.model, attention, precision=self.policy.precision, sharded=sharded)
        try:
            found = GradientCheck(other, self.recomputation)._gradient("none")
            problem = self._compare(found, self.policy.attention.kernel, TOLERANCES_OF_KERNELS)
        except FAILURES as error:
            problem = self._failure(error)
        return self.ranks.first_problem(problem)

    def _failure(self, error: BaseException) -> str:
        """A description of how a pass has failed; empty if memory did not suffice.

        Raises the error if ranks run the pass together, because the others wait for the rest of it.
        """
        is_memory = is_out_of_memory(error, self.policy.model.device)
        if self.policy.sharded is not None:
            if is_memory:
                raise error
            self.policy.sharded.reset()
        return "" if is_memory else f"fails ({first_line(error)})"

    def _compare(
        self,
        found: dict[str, Sketch],
        other: str = "none",
        tolerances: Mapping[str, tuple[float, float]] = TOLERANCES,
    ) -> str:
        dtype = self.policy.model.dtype
        is_fp32 = self.policy.precision == "fp32" and dtype == torch.float32
        of_own, of_all = tolerances["fp32" if is_fp32 else "16 bits"]
        norm = sum(sketch.norm**2 for sketch in self._expected.values()) ** 0.5
        for name, expected in self._expected.items():
            gap = found[name].gap(expected) if name in found else expected.norm
            if not gap <= of_own * expected.norm + of_all * norm:
                return f"gives another gradient than {other} ({name}: by {gap:.2g} of {expected.norm:.2g})"
        return ""

    @cached_property
    def _expected(self) -> dict[str, Sketch]:
        return self._gradient("none")

    def _gradient(self, mode: str) -> dict[str, Sketch]:
        """Sketches of the gradient of a loss that raises one answer and lowers the other, by parameter."""
        model, before = self.policy.model, self.recomputation.mode
        found: dict[str, Sketch] = {}
        trained = self.policy.trained
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_take, name, found))
            for name, parameter in trained.items()
        ]
        self.recomputation.mode = mode
        for parameter in trained.values():
            parameter.grad = None  # left by a step that did not fit and is repeated
        try:
            rows = short_rows(model.config.get_text_config().vocab_size, 64)[:2]
            (logps,) = self.policy([rows])
            loss = (logps.sums() * torch.tensor([0.5, -0.4], device=logps.tokens_T.device)).sum()
            if logps.routing is not None:
                loss = loss + logps.routing.probs_E.square().sum()
            loss.backward()
        finally:
            self.recomputation.mode = before
            for hook in hooks:
                hook.remove()
            for parameter in trained.values():
                parameter.grad = None
        return found


def with_right_kernel(
    model: PreTrainedModel,
    attention: AttentionChoice,
    recomputation: Recomputation,
    precision: str,
    log: Log,
    *,
    sharded: ShardedModel | None = None,
    ranks: Ranks | None = None,
) -> AttentionChoice:
    """The attention with the first kernel, starting with its own, whose gradient equals that of segments."""
    if attention.name != "forest" or attention.kernel == SEGMENTS:
        return attention
    segments = replace(attention, kernel=SEGMENTS)
    # float32 weights are also checked without mixed precision, whose rounding hides smaller errors
    precisions = {precision, "fp32"} if model.dtype == torch.float32 else {precision}
    checks = [
        GradientCheck(
            PolicyModel(model, segments, precision=one, sharded=sharded), recomputation, ranks or Ranks()
        )
        for one in sorted(precisions)
    ]

    def problem_of(kernel: str) -> str:
        return next(filter(None, (check.problem_of_kernel(kernel) for check in checks)), "")

    return first_right_kernel(attention, model.device, problem_of, log)


def first_right_kernel(
    attention: AttentionChoice, device: torch.device, problem_of: Callable[[str], str], log: Log
) -> AttentionChoice:
    """The attention with the first kernel, starting with its own, for which `problem_of` finds no problem."""
    kernels = kernels_of(device)
    for kernel in kernels[kernels.index(attention.kernel) : kernels.index(SEGMENTS)]:
        if not (problem := problem_of(kernel)):
            return replace(attention, kernel=kernel)
        log(f"attention by {kernel} {problem} on a short pair, so it is not used.")
    return replace(attention, kernel=SEGMENTS)


@torch.no_grad()
def _take(name: str, found: dict[str, Sketch], parameter: torch.Tensor) -> None:
    """Replace the gradient by its sketch, which is added to an earlier one."""
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    sums = [
        gradient.sum([other for other in range(gradient.ndim) if other != dim])
        if gradient.ndim > 1
        else gradient
        for dim in range(gradient.ndim)
    ]
    sketch = Sketch(
        float(gradient.norm()), torch.cat([one.flatten() for one in sums] or [gradient.flatten()])
    )
    parameter.grad = None
    if name in found:
        before = found[name]
        sketch = Sketch(before.norm + sketch.norm, before.sums + sketch.sums)
    found[name] = sketch
