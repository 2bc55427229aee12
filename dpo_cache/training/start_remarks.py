"""Remarks on slow or useless choices, before the first step of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpo_cache.training.launch import unused_settings
from dpo_cache.training.warnings import FEW_STEPS, describe_few_steps

if TYPE_CHECKING:
    from dpo_cache.training.setup import Setup


def start_remarks(setup: Setup) -> Iterator[str]:
    """Yield the remarks on the choices of a run."""
    policy, data, options, total_steps = setup.policy, setup.data, setup.options, setup.total_steps
    if remark := policy.attention.remark(policy.model, "trained"):
        yield remark
    if setup.checkpoint is None and total_steps < FEW_STEPS:
        yield describe_few_steps(options, data.num_pairs, total_steps, setup.peak_lr)
    for name, schedule in (("eval_every", setup.evaluates), ("save_every", setup.saves)):
        value = getattr(options, name)
        if value is not None and not schedule.count(1, total_steps):
            yield f"`{name}` {value} never triggers: the run has {total_steps} steps."
    yield from unused_settings(options.parallel)
    if options.launch not in (None, setup.ranks.size):
        yield f"`launch` {options.launch} has no effect: {setup.ranks.size} processes run already."
    if options.parallel != "ddp" and setup.ranks.size == 1:
        yield f"`parallel` {options.parallel} has no effect: one process trains."
    for name, entry in options.earlier_names().items():
        yield f"{name} is an earlier name of `place` {entry}."
    if options.max_grad_norm and not policy.clips(options):
        yield (
            f"the gradient is not clipped to `max_grad_norm` {options.max_grad_norm}: under `memory` "
            f"{policy.memory} each layer is updated before the norm of all is known."
        )
    if data.eval_pairs is not None and (shared := setup.inputs["num_shared_eval_pairs"]):
        yield (
            f"{shared:,} of {len(data.eval_pairs):,} evaluation pairs have prompts that are also trained on: "
            "those are not held out."
        )
