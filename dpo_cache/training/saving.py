"""Saves the policy of a run: its checkpoints, the policy of the best evaluation, and finally the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpo_cache.errors import TrainingError
from dpo_cache.lm.sharded import local_rows
from dpo_cache.log import phase
from dpo_cache.losses.metrics import Metrics
from dpo_cache.training.evaluations import Best
from dpo_cache.training.output.checkpoint import save_checkpoint
from dpo_cache.training.output.metrics_file import MetricsFile
from dpo_cache.training.output.model_card import library_versions, model_card
from dpo_cache.training.output.run_folder import save_best, save_model
from dpo_cache.training.output.run_position import RunPosition
from dpo_cache.training.output.run_start import remove_leftovers
from dpo_cache.training.setup import Setup
from dpo_cache.training.step import TrainingStep
from dpo_cache.types import ScoredPair


@dataclass(frozen=True)
class Saver:
    """Saves the policy of a run; weights that are not finite never replace good ones."""

    setup: Setup
    step: TrainingStep
    files: tuple[MetricsFile, ...]  # metrics.jsonl and samples.jsonl
    best: Best
    on_checkpoint: Callable[[Path], None]

    @phase("saving a checkpoint")
    def save_checkpoint(self, position: RunPosition) -> None:
        """Save the state after a step, from which `resume` continues."""
        self._check_weights(position.step, "no checkpoint")
        setup = self.setup
        for file in self.files if setup.ranks.is_main else ():
            file.fsync()
        position = replace(position, step_memory=setup.step_memory.state(), best=asdict(self.best))
        keep, ranks = setup.options.keep, setup.ranks
        self.on_checkpoint(
            save_checkpoint(setup.output, setup.policy, setup.optimizer, position, keep=keep, ranks=ranks)
        )

    def keep_best(self, evaluation: Metrics | None, step: int) -> None:
        """Save the policy of the best evaluation so far, unless it is that of the last step, which will be in
        model/.
        """
        if evaluation is None or not self.best.note(evaluation):
            return
        if self.setup.options.eval_every is not None and step != self.setup.total_steps:
            found = {name: value for name, value in asdict(self.best).items() if name != "num_worse"}
            card = self._card(step, evaluation)
            save_best(self.setup.output, self.setup.policy, found, card, self.setup.ranks)

    @phase("saving the model")
    def save_model(self, step: int, newest: list[ScoredPair]) -> Metrics | None:
        """Save the model: the last one or, with `patience`, the best. Returns its evaluation.

        `newest` are pairs of the last step: the loss of one of them must be finite.
        """
        output, options = self.setup.output, self.setup.options
        self._check_weights(step, "no model")
        if self.setup.data.eval_pairs is None:  # otherwise the last evaluation has checked it
            self._check_values(step, newest)
        is_best_elsewhere = self.best.step not in (None, step)
        takes_best = bool(options.patience) and is_best_elsewhere
        evaluation = self.files[0].last("eval/loss", step=self.best.step if takes_best else None)
        card = self._card(self.best.step if takes_best and self.best.step else step, evaluation)
        save_model(
            output,
            self.setup.policy,
            card,
            best_step=self.best.step if takes_best else None,
            # then the best policy is in model/
            drops_best=takes_best or not is_best_elsewhere,
            is_merged=options.merge_adapter,
            ranks=self.setup.ranks,
        )
        try:
            if self.setup.ranks.is_main:
                remove_leftovers(output)
        except TrainingError as error:  # the model is published
            self.setup.log(str(error))
        return evaluation

    def _check_weights(self, step: int, what: str) -> None:
        parameters = map(local_rows, self.setup.policy.model.parameters())
        are_finite = all(one.is_meta or bool(one.isfinite().all()) for one in parameters)  # meta: on disk
        if self.setup.ranks.any(not are_finite):
            raise TrainingError(
                f"step {step}: the update left weights that are not finite; {what} was saved.\nLower `lr`."
            )

    def _check_values(self, step: int, newest: list[ScoredPair]) -> None:
        """Raise `TrainingError` if the loss of a pair of the last step is not finite with these weights."""
        if newest and self.step.rows_with_nonfinite_loss(newest):
            raise TrainingError(
                f"step {step}: after the update the loss of row {newest[0].pair.row} is not finite; no "
                "model was saved.\nLower `lr`."
            )

    def _card(self, step: int, evaluation: Metrics | None) -> str:
        """The model card of the policy after a step; the main rank writes it."""
        if not self.setup.ranks.is_main:
            return ""
        lines, config, data = self.files[0], self.setup.config(), self.setup.data
        return model_card(
            config,
            data.pairs.manifest,
            data.reference,
            before=lines.first("eval/loss"),
            after=evaluation,
            first=lines.first("loss"),
            last=lines.last("loss", step=step),
            num_steps=step,
            versions=library_versions(config),
        )
