"""Open and check everything that a training run needs, before its output folder is changed."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dpo_cache.errors import ModelError, OptionError, TrainingError
from dpo_cache.lm.device import choose_device
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.model.adapter import describe
from dpo_cache.lm.model.architecture import auto_class
from dpo_cache.lm.model.code_digest import CAUSAL_LM
from dpo_cache.lm.model.quantization import num_values
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.routing import router_coefficient
from dpo_cache.log import Log
from dpo_cache.losses.objective import Objective
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.train import TrainOptions
from dpo_cache.planning.advice import less_memory
from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import digest_json
from dpo_cache.training.batches import count_shared
from dpo_cache.training.evaluations import Schedule, schedule_of
from dpo_cache.training.gradient_check import GradientCheck
from dpo_cache.training.inputs import TrainedModel, TrainingPairs, open_pairs, open_policy
from dpo_cache.training.layer_major import LayerMajorSteps
from dpo_cache.training.loaded import LoadedPolicy
from dpo_cache.training.optim.optimizers import make_optimizer
from dpo_cache.training.optim.schedule import learning_rate
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.output.checkpoint import (
    check_files,
    damaged,
    read_position,
    restore_optimizer,
)
from dpo_cache.training.output.run_folder import check_config, read_config
from dpo_cache.training.output.run_position import RunPosition
from dpo_cache.training.output.run_start import find_start
from dpo_cache.training.output.tracker_access import check_trackers
from dpo_cache.training.pair_logps import objective_of
from dpo_cache.training.ranks import Ranks, check_same_inputs
from dpo_cache.training.start_remarks import start_remarks
from dpo_cache.training.step_memory import StepMemory
from dpo_cache.training.step_zero import expectation_of
from dpo_cache.types import token_rounding

FREED = (
    "`place` gradients=none: this model does not run layer by layer, so each rank would update its weights "
    "by its own pairs, before the gradients are added up.\nLeave it out, or use `parallel` fsdp."
)


@dataclass(frozen=True)
class Setup:
    """The pairs, the policy and its optimizer; for a resumed run, in the state of its checkpoint."""

    options: TrainOptions
    log: Log
    device: torch.device
    data: TrainingPairs
    inputs: dict[str, Any]  # see `resolved_inputs`
    policy: TrainedModel
    objective: Objective
    step_memory: StepMemory
    optimizer: Updater
    in_backward: OptimizerInBackward | None  # None: gradients are kept
    layer_major: LayerMajorSteps | None  # None: each forest runs through all layers
    peak_lr: float
    total_steps: int
    evaluates: Schedule
    saves: Schedule
    num_parameters: int
    num_trained: int
    checkpoint: Path | None  # the checkpoint of a resumed run
    position: RunPosition  # at the start
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    def lr(self, step: int) -> float:
        """The learning rate of an update, numbered from 0."""
        options = self.options
        return learning_rate(
            step,
            self.total_steps,
            peak=self.peak_lr,
            schedule=options.lr_schedule,
            warmup_ratio=options.warmup_ratio,
            warmup_steps=options.warmup_steps,
        )

    def policy_model(self) -> PolicyModel:
        """The policy as one module that computes what the objective needs."""
        return _policy_model(self.policy, self.objective)

    def config(self) -> dict[str, Any]:
        """The content of config.json: every option, and the resolved values."""
        return {**asdict(self.options), "resolved": self.resolved()}

    def resolved(self) -> dict[str, Any]:
        """The values that the run uses in place of `auto` and other defaults, and the ids of its inputs."""
        policy = self.policy
        return {
            "model": policy.location,
            "adapter": describe(policy.adapted) if policy.adapted else None,
            "base_weights": policy.origin.base_weights,
            **self.inputs,
            "attention": policy.attention.name,
            "precision": policy.precision,
            "device": str(self.device),
            **({"num_ranks": self.ranks.size} if self.ranks.size > 1 else {}),
            "budget_tokens": self.step_memory.micro_tokens,
            "gradient_checkpointing": self.step_memory.mode,
            "memory": policy.memory if self.layer_major or not policy.layer_major else "fast",
            "lr": self.peak_lr,
            "clips": policy.clips(self.options),
            "linear": policy.linear,
            "router_coefficient": self.objective.router_coefficient,
            **(
                {"auto_class": loads_by} if (loads_by := auto_class(policy.model.config)) != CAUSAL_LM else {}
            ),
        }

    def log_remarks(self) -> None:
        """Log remarks on slow or useless choices before the first step."""
        for text in start_remarks(self):
            self.log(text)


@contextmanager
def open_setup(
    options: TrainOptions, log: Log, loaded: LoadedPolicy | None = None, ranks: Ranks | None = None
) -> Iterator[Setup]:
    """Find, check and load the inputs that the options name; nothing is written. Raises `DpoCacheError`.

    With several `ranks` each of them calls this. A `loaded` policy replaces the model that the options name.
    When the block ends, the model is as it was before it was prepared for training.
    """
    ranks, output = ranks or Ranks(), Path(options.output)
    options.check_ranks(ranks.size)
    if ranks.is_main:
        check_trackers(options.log_to, is_dry_run=options.dry_run)
    checkpoint = _find_start(output, log, ranks, resume=bool(options.resume))
    position = read_position(checkpoint) if checkpoint else RunPosition()
    device = torch.device(ranks.device) if ranks.device else choose_device(options.device)
    data = open_pairs(options, open_cache(options.cache))
    steps_per_epoch = math.ceil(data.num_pairs / options.batch_size)
    total_steps = _count_steps(options, steps_per_epoch)
    inputs = resolved_inputs(options, data, total_steps)
    check_same_inputs(ranks, {**inputs, "position": asdict(position)})
    inputs["num_shared_eval_pairs"] = ranks.share(_count_shared(data) if ranks.is_main else 0)
    _check_resumed(options, checkpoint, inputs)
    if checkpoint is not None:
        check_files(checkpoint)
    linear = _decided_linear(output if checkpoint else None, is_deterministic=options.deterministic)
    memory = read_config(output)["resolved"].get("memory") if checkpoint else None
    with ExitStack() as stack:
        with _reading(checkpoint):
            policy = stack.enter_context(
                open_policy(
                    options,
                    data,
                    device,
                    checkpoint,
                    linear=linear,
                    memory=memory,
                    log=log,
                    loaded=loaded,
                    ranks=ranks,
                )
            )
        check_same_inputs(ranks, {"start": asdict(policy.origin)})
        found = {
            "base_weights": policy.origin.base_weights,
            "precision": policy.precision,
            "clips": policy.clips(options),
        }
        _check_resumed(options, checkpoint, found)  # before its state is restored
        parameters = list(policy.model.parameters())
        peak_lr = _peak_lr(options, policy, output if checkpoint else None)
        optimizer = _make_optimizer(options, policy, device, checkpoint, lr=peak_lr)
        coefficient = router_coefficient(policy.model, options.router_aux_loss_coef)
        rounding = token_rounding(expectation_of(policy, data, options).dtype)
        objective = objective_of(options, coefficient, rounding)
        layer_major, in_backward = _choose_steps(policy, objective, optimizer, log, ranks)
        yield Setup(
            options=options,
            log=log,
            device=device,
            data=data,
            inputs=inputs,
            policy=policy,
            objective=objective,
            step_memory=_plan_memory(
                options, policy, objective, position, log, ranks, is_layer_major=layer_major is not None
            ),
            optimizer=optimizer,
            in_backward=in_backward,
            layer_major=layer_major,
            peak_lr=peak_lr,
            total_steps=total_steps,
            evaluates=schedule_of("`eval_every`", options.eval_every, steps_per_epoch),
            saves=schedule_of("`save_every`", options.save_every, steps_per_epoch),
            num_parameters=sum(map(num_values, parameters)),
            num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            checkpoint=checkpoint,
            position=position,
            ranks=ranks,
        )


def _find_start(output: Path, log: Log, ranks: Ranks, *, resume: bool) -> Path | None:
    """The checkpoint to start from, which the main rank finds, because it may already write to the folder
    when others look. Raises `TrainingError`.
    """
    checkpoint = ranks.share(find_start(output, log, resume=resume) if ranks.is_main else None)
    if checkpoint is not None and not checkpoint.is_dir():
        raise TrainingError(
            f"{checkpoint}: not there on {platform.node()}, where this rank is.\n"
            "Resume the run with `output` on a disk that all machines share."
        )
    return checkpoint


def resolved_inputs(options: TrainOptions, data: TrainingPairs, total_steps: int) -> dict[str, Any]:
    """The resolved values that are known before the model is loaded."""
    eval_pairs = data.eval_pairs if options.eval_pairs else None
    with_tokens = options.ld_alpha is not None and options.ld_reference  # otherwise only the sums matter
    return {
        "reference": data.pairs.reference_id,
        "cache": options.cache,
        "pairs": data.pairs.name,
        "eval_pairs": None if eval_pairs is None else eval_pairs.name,
        "pairs_digest": data.pairs.manifest["pairs_digest"],
        # the blocks of the shuffle depend on it: very long pairs are in smaller ones
        "shuffled_blocks": digest_json(data.pairs.block_sizes) if options.shuffle else None,
        "reference_values": data.pairs.values_digest(with_tokens=with_tokens),
        "eval_pairs_digest": None if eval_pairs is None else eval_pairs.manifest["pairs_digest"],
        "eval_reference_values": None
        if eval_pairs is None
        else eval_pairs.values_digest(with_tokens=with_tokens),
        "num_pairs": data.num_pairs,
        "num_eval_pairs": int(data.eval_selected.sum()),
        "total_steps": total_steps,
    }


def _count_shared(data: TrainingPairs) -> int:
    """The number of evaluation pairs whose prompts are trained on; 0 for a share of the training set."""
    if data.eval_pairs is None or data.eval_pairs is data.pairs:
        return 0
    return count_shared(data.pairs, data.eval_pairs)


def _peak_lr(options: TrainOptions, policy: TrainedModel, resumed: Path | None) -> float:
    """The peak learning rate: the given one, that of a run to be resumed, or the default."""
    if options.lr is None and resumed is not None:
        before = read_config(resumed)
        return float(before["resolved"].get("lr") or before["lr"])  # earlier versions: an option
    return options.peak_lr(is_adapted=policy.adapted is not None)


def _choose_steps(
    policy: TrainedModel, objective: Objective, optimizer: Updater, log: Log, ranks: Ranks
) -> tuple[LayerMajorSteps | None, OptimizerInBackward | None]:
    """The way to run steps: layer by layer if that is right for the policy, else forest by forest; and the
    optimizer within the backward pass, if gradients are not kept.
    """
    drops, found = policy.placement.gradients == "none", policy.layer_major
    if found is not None:
        model, has_routing = _policy_model(policy, objective), bool(objective.router_coefficient)
        problem = found.problem(model, has_routing=has_routing)
        if not problem:
            in_backward = OptimizerInBackward(optimizer, is_hooked=False) if drops else None
            return LayerMajorSteps(
                model, found, has_routing=has_routing, in_backward=in_backward, ranks=ranks
            ), in_backward
        problem = f"{type(policy.model).__name__} cannot run layer by layer: {problem}"
        if not isinstance(found.weights, ResidentWeights):
            raise ModelError(
                f"{problem}.\nUse `memory` fast, or `place` with weights=device and optimizer=device."
            )
        log(f"{problem}. Each forest runs through all layers instead, as under `memory` fast.")
    if drops and ranks.size > 1 and not ranks.shards:
        raise OptionError(FREED)
    return None, OptimizerInBackward(optimizer, ranks=ranks) if drops else None


@contextmanager
def _reading(checkpoint: Path | None) -> Iterator[None]:
    """Turn a `ModelError` about a checkpoint's files into the error for a damaged checkpoint."""
    try:
        yield
    except ModelError as error:
        if checkpoint is None or str(checkpoint) not in str(error):
            raise
        raise damaged(checkpoint, error) from error


def _check_resumed(options: TrainOptions, checkpoint: Path | None, resolved: dict[str, Any]) -> None:
    """Raise `TrainingError` if these values show that a resumed run would have another result."""
    if checkpoint is not None:
        check_config(Path(options.output), {**asdict(options), "resolved": resolved})


def _plan_memory(
    options: TrainOptions,
    policy: TrainedModel,
    objective: Objective,
    position: RunPosition,
    log: Log,
    ranks: Ranks,
    *,
    is_layer_major: bool,
) -> StepMemory:
    memory = StepMemory(
        policy.model,
        policy.recomputation,
        number_or_auto("budget_tokens", options.budget_tokens),
        options.gradient_checkpointing,
        log,
        precision=policy.precision,
        is_deterministic=options.deterministic,
        most_tokens=policy.attention.max_tokens,
        is_layer_major=is_layer_major,
        less_memory=partial(less_memory, policy.model.config, policy.method, policy.placement),
    )
    memory.agree(ranks)
    if position.step_memory:
        memory.restore(position.step_memory)
    memory.use_right_modes(_check_of_modes(policy, objective, ranks, is_layer_major=is_layer_major))
    return memory


def _check_of_modes(
    policy: TrainedModel, objective: Objective, ranks: Ranks, *, is_layer_major: bool
) -> Callable[[str], str]:
    """The function that describes how a mode of recomputation changes the gradient; empty if it does not."""
    model, found = _policy_model(policy, objective), policy.layer_major
    if not is_layer_major:
        return GradientCheck(model, policy.recomputation, ranks).problem
    assert found is not None
    has_routing = bool(objective.router_coefficient)

    @cache
    def problem(mode: str) -> str:
        return ranks.first_problem(
            found.problem_of_mode(model, policy.recomputation, mode, has_routing=has_routing)
        )

    return problem


def _policy_model(policy: TrainedModel, objective: Objective) -> PolicyModel:
    """The policy as one module that computes what the objective needs."""
    return PolicyModel(
        policy.model,
        policy.attention,
        precision=policy.precision,
        with_squares=objective.wpo != "off",
        with_routing=bool(objective.router_coefficient),
        sharded=policy.sharded,
    )


def _make_optimizer(
    options: TrainOptions,
    policy: TrainedModel,
    device: torch.device,
    checkpoint: Path | None,
    *,
    lr: float,
) -> Updater:
    shards = policy.sharded.shards if policy.sharded else None
    optimizer = make_optimizer(
        policy.model,
        options.optimizer.removesuffix("-paged"),  # paged is a placement
        lr=lr,
        weight_decay=options.weight_decay,
        rounding=options.rounding,
        seed=options.seed,
        compute_device=device,
        shards=shards,
    )
    if checkpoint:
        restore_optimizer(checkpoint, optimizer, shards)
    return optimizer


def _count_steps(options: TrainOptions, steps_per_epoch: int) -> int:
    total_steps = options.max_steps or math.ceil(options.epochs * steps_per_epoch - 1e-9)
    if not total_steps:
        raise OptionError(
            f"`epochs` {options.epochs}: not a single step of {steps_per_epoch} an epoch.\n"
            "Use more, or `max_steps`."
        )
    return total_steps


def _decided_linear(resumed: Path | None, *, is_deterministic: bool) -> str | None:
    """The library that multiplies: in a resumed run the same as before, oneDNN if deterministic; None:
    measure both.
    """
    if resumed is not None:
        return read_config(resumed)["resolved"].get("linear", "torch")
    return "onednn" if is_deterministic else None
