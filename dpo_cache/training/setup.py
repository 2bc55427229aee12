"""All that a training run needs, opened and checked before its output folder is touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_cache.errors import OptionError
from dpo_cache.lm.device import choose_device
from dpo_cache.lm.model.adapter import describe
from dpo_cache.lm.model.quantization import num_values
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.routing import router_coefficient
from dpo_cache.log import Log
from dpo_cache.losses.objective import Objective
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.train import TrainOptions
from dpo_cache.store import open_cache
from dpo_cache.training.batches import count_shared
from dpo_cache.training.evaluations import Schedule, schedule_of
from dpo_cache.training.inputs import TrainedModel, TrainingPairs, open_pairs, open_policy
from dpo_cache.training.loaded import LoadedPolicy
from dpo_cache.training.optim.optimizers import make_optimizer
from dpo_cache.training.optim.schedule import learning_rate
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.output.checkpoint import RunPosition, read_position, restore_optimizer
from dpo_cache.training.output.run_folder import check_disk, read_resolved
from dpo_cache.training.output.run_start import find_start
from dpo_cache.training.output.trackers import check_trackers
from dpo_cache.training.pair_logps import objective_of
from dpo_cache.training.step_memory import StepMemory


@dataclass(frozen=True)
class Setup:
    """The pairs, the policy and what updates it; where a run is resumed, as its checkpoint has them."""

    options: TrainOptions
    log: Log
    device: torch.device
    data: TrainingPairs
    policy: TrainedModel
    objective: Objective
    step_memory: StepMemory
    optimizer: Updater
    in_backward: (
        OptimizerInBackward | None
    )  # where `free_gradients` updates the weights inside the backward pass
    total_steps: int
    evaluates: Schedule
    saves: Schedule
    num_parameters: int
    num_trained: int
    checkpoint: Path | None  # what the run goes on from
    position: RunPosition  # where it stands at its start

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    def lr(self, step: int) -> float:
        """The learning rate of an update, numbered from 0."""
        options = self.options
        return learning_rate(
            step,
            self.total_steps,
            peak=options.lr,
            schedule=options.lr_schedule,
            warmup_ratio=options.warmup_ratio,
        )

    def policy_model(self) -> PolicyModel:
        """The policy as one module, with what the objective needs of it."""
        return PolicyModel(
            self.policy.model,
            self.policy.attention,
            precision=self.policy.precision,
            with_squares=self.objective.wpo != "off",
            with_routing=bool(self.objective.router_coefficient),
        )

    def check_disk(self) -> None:
        """Raise `TrainingError` where what the run writes has no room."""
        options = self.options
        num_checkpoints, keeps_best = (
            options.keep if options.save_every else 0,
            options.eval_every is not None,
        )
        check_disk(
            self.output,
            self.policy.model,
            num_checkpoints=num_checkpoints,
            keeps_best=keeps_best,
            is_merged=options.merge_adapter,
        )

    def config(self) -> dict[str, Any]:
        """What config.json holds: every option, and what became of the defaults."""
        return {**asdict(self.options), "resolved": self.resolved()}

    def resolved(self) -> dict[str, Any]:
        """What became of the defaults."""
        data, policy = self.data, self.policy
        return {
            "model": policy.location,
            "adapter": describe(policy.adapted) if policy.adapted else None,
            "base_weights": policy.base_weights,
            "reference": data.pairs.reference_id,
            "cache": self.options.cache,
            "pairs": data.pairs.name,
            "eval_pairs": data.eval_pairs.name
            if data.eval_pairs is not None and self.options.eval_pairs
            else None,
            "pairs_digest": data.pairs.manifest["pairs_digest"],
            "num_pairs": data.num_pairs,
            "num_eval_pairs": int(data.eval_selected.sum()),
            "total_steps": self.total_steps,
            "attention": policy.attention.name,
            "precision": policy.precision,
            "device": str(self.device),
            "budget_tokens": self.step_memory.micro_tokens,
            "gradient_checkpointing": self.step_memory.mode,
            "linear": self.policy.linear,
            "router_coefficient": self.objective.router_coefficient,
        }

    def log_remarks(self) -> None:
        """Log what a user should know before the first step."""
        model, data, options = self.policy.model, self.data, self.options
        if self.policy.attention.name == "rows":
            self.log(
                f"{type(model).__name__} is trained on plain padded rows, which is slower: "
                f"{self.policy.attention.reason}."
            )
        if self.checkpoint is None and not any(self.lr(step) for step in range(min(self.total_steps, 1000))):
            self.log(
                f"nothing will be learned: the warm-up (`warmup_ratio` {options.warmup_ratio}) takes all "
                f"{self.total_steps} steps."
            )
        periods = {
            "`eval_every`": (options.eval_every, self.evaluates),
            "`save_every`": (options.save_every, self.saves),
        }
        for flag, (value, schedule) in periods.items():
            if value is not None and not schedule.count(1, self.total_steps):
                self.log(f"{flag} {value} never triggers: the run has {self.total_steps} steps.")
        if (
            data.eval_pairs is not None
            and data.eval_pairs is not data.pairs
            and (shared := count_shared(data.pairs, data.eval_pairs))
        ):
            self.log(
                f"{shared:,} of {len(data.eval_pairs):,} evaluation pairs are also "
                "training pairs: those are not held out."
            )


@contextmanager
def open_setup(options: TrainOptions, log: Log, loaded: LoadedPolicy | None = None) -> Iterator[Setup]:
    """Find, check and load all that the options name; nothing is written. Raises `DpoCacheError`.

    A `loaded` policy takes the place of the model that the options name.
    When the block ends, the model is as it was before it was prepared for training.
    """
    check_trackers(options.log_to)
    output = Path(options.output)
    checkpoint = find_start(output, log, resume=bool(options.resume))
    position = read_position(checkpoint) if checkpoint else RunPosition()
    device = choose_device(options.device)
    data = open_pairs(options, open_cache(options.cache))
    is_onednn = _decided_linear(output if checkpoint else None, is_deterministic=options.deterministic)
    with open_policy(
        options, data, device, checkpoint, is_onednn=is_onednn, log=log, loaded=loaded
    ) as policy:
        yield _set_up(options, data, policy, device, checkpoint, position, log)


def _set_up(
    options: TrainOptions,
    data: TrainingPairs,
    policy: TrainedModel,
    device: torch.device,
    checkpoint: Path | None,
    position: RunPosition,
    log: Log,
) -> Setup:
    model, steps_per_epoch = policy.model, math.ceil(data.num_pairs / options.batch_size)
    total_steps = _count_steps(options, steps_per_epoch)
    step_memory = StepMemory(
        model,
        policy.recomputation,
        number_or_auto("budget_tokens", options.budget_tokens),
        options.gradient_checkpointing,
        log,
        precision=policy.precision,
        is_deterministic=options.deterministic,
    )
    if position.step_memory:
        step_memory.restore(position.step_memory)
    optimizer = make_optimizer(
        model,
        options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        rounding=options.rounding,
        seed=options.seed,
    )
    if checkpoint:
        restore_optimizer(checkpoint, optimizer)
    return Setup(
        options=options,
        log=log,
        device=device,
        data=data,
        policy=policy,
        objective=objective_of(options, router_coefficient(model, options.router_aux_loss_coef)),
        step_memory=step_memory,
        optimizer=optimizer,
        in_backward=OptimizerInBackward(optimizer) if options.free_gradients else None,
        total_steps=total_steps,
        evaluates=schedule_of("`eval_every`", options.eval_every, steps_per_epoch),
        saves=schedule_of("`save_every`", options.save_every, steps_per_epoch),
        num_parameters=sum(map(num_values, model.parameters())),
        num_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        checkpoint=checkpoint,
        position=position,
    )


def _count_steps(options: TrainOptions, steps_per_epoch: int) -> int:
    total_steps = options.max_steps or math.ceil(options.epochs * steps_per_epoch - 1e-9)
    if not total_steps:
        raise OptionError(
            f"`epochs` {options.epochs}: not a single step of {steps_per_epoch} an epoch.\n"
            "Use more, or `max_steps`."
        )
    return total_steps


def _decided_linear(resumed: Path | None, *, is_deterministic: bool) -> bool | None:
    """Whether oneDNN multiplies: as before in a resumed run, by rule under `deterministic`; None: measure
    it.
    """
    if resumed is not None:
        return read_resolved(resumed).get("linear", "torch") == "onednn"
    return True if is_deterministic else None
