"""The steps of a training run on each of several ranks, without its files; and runs to compare them with."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import dpo_cache
from dpo_cache.options.train import TrainOptions
from dpo_cache.training.batches import longest_pairs, stream_pairs
from dpo_cache.training.parallel import parallelize
from dpo_cache.training.ranked_step import RankedStep, make_step
from dpo_cache.training.ranks import Ranks
from dpo_cache.training.sample import sample_pairs
from dpo_cache.training.setup import Setup, open_setup
from dpo_cache.training.step import TrainingStep
from dpo_cache.training.step_zero import open_base_check, open_step_zero
from tests.conftest import chat_rows, make_tokenizer, write_rows

SHARED: dict[str, Any] = {
    "pairs": "pairs",
    "output": "unused",
    "batch_size": 4,
    "max_steps": 3,
    "lr": 5e-4,
    "gradient_checkpointing": "none",
}


@dataclass
class Steps:
    """What a run has computed; weights by name, only of the main rank where `shards`."""

    lines: list[dict[str, Any]] = field(default_factory=list)  # metrics of evaluations and steps
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    gap: float | None = None  # of step zero
    num_compared: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # of the step's memory at the end
    error: str = ""

    @property
    def largest_change(self) -> float:
        """Of a weight, from the first step to the last."""
        return gap_of(self.weights, self.before)


def gap_of(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest gap between two values of a weight."""
    assert ones.keys() == others.keys()
    return max(float((one - others[name]).abs().max()) for name, one in ones.items())


def make_cache(folder: Path, model: torch.nn.Module, num_rows: int = 15) -> str:
    """A cache of pairs scored by the model, which is saved next to it; `heldout` is for evaluations."""
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, rows in {"pairs": chat_rows(num_rows), "heldout": chat_rows(7, seed=9)}.items():
        data = write_rows(folder / f"{name}.jsonl", rows)
        dpo_cache.precompute(str(folder / "model"), data, str(folder / "cache"))
    return str(folder / "cache")


def run_steps(ranks: Ranks, cache: str, options: dict[str, Any], *, shards: bool = False) -> Steps:
    """Take the steps of a run with these options: evaluate, compare with the reference, update, evaluate."""
    ranks.shards, found = shards, Steps()
    chosen = TrainOptions(cache=cache, **{**SHARED, **options})
    with open_setup(chosen, found.remarks.append, ranks=ranks) as setup:
        policy = parallelize(setup.policy_model(), ranks, is_layer_major=setup.layer_major is not None)
        step = make_step(
            setup, policy, open_step_zero(setup.policy, setup.data, setup.options, is_resumed=False)
        )
        assert isinstance(step, RankedStep) == (ranks.size > 1)
        found.before = weights_of(setup)
        try:
            _take_steps(setup, step, found)
        except dpo_cache.DpoCacheError as error:
            found.error = f"{type(error).__name__}: {error}"
        found.weights, found.gap = weights_of(setup), step.step_zero_gap
        found.settings = setup.step_memory.state()
    return found


def _take_steps(setup: Setup, step: TrainingStep, found: Steps) -> None:
    data, options = setup.data, setup.options
    if isinstance(step, RankedStep):
        step.try_step(longest_pairs(data.pairs, data.selected, options.batch_size))
    if data.eval_pairs is not None:
        found.lines.append(dict(step.evaluate(0)))
    if (base_check := open_base_check(setup.policy, data, options)) is not None:
        found.remarks.append(step.check_base(sample_pairs(data.pairs, data.selected, 5), base_check))
    if step.step_zero is not None:
        step.step_zero.begin_training()
        step.compare(sample_pairs(data.pairs, data.selected, 5))
        found.num_compared = len(step.step_zero.compared)
    number, epoch = 0, 0
    while number < setup.total_steps:
        stream = stream_pairs(data.pairs, data.selected, shuffle=True, seed=options.seed, epoch=epoch)
        while number < setup.total_steps and (pairs := list(islice(stream, options.batch_size))):
            number += 1
            metrics, num_tokens, grad_norm = step.take(pairs, number, options.lr)
            found.lines.append({**metrics.means(), "grad_norm": grad_norm, "num_tokens": num_tokens})
        epoch += 1
    if data.eval_pairs is not None:
        found.lines.append(dict(step.evaluate(number)))


def weights_of(setup: Setup) -> dict[str, torch.Tensor]:
    """The whole trained weights, copied; every rank calls it."""
    return {
        name: whole(parameter)
        for name, parameter in setup.policy.model.named_parameters()
        if parameter.requires_grad
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a weight, of which ranks may have shards."""
    full_tensor = getattr(parameter, "full_tensor", None)
    values = full_tensor() if full_tensor is not None else parameter
    return values.detach().clone()
