"""Run TRL's own loss code on given log-probs: `python trl_losses.py CASES.json OUT.json`, where TRL is
installed.

`DPOTrainer._compute_loss` is called on a trainer without its `__init__`, whose model returns the token
log-probs of the case instead of computing any. The losses of CPO and ORPO are methods that take log-probs and
are called directly. This file imports nothing from dpo-cache.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer


class GivenLogps(torch.nn.Module):
    """A model that returns given log-probs."""

    is_gradient_checkpointing = False

    def __init__(self, logps: torch.Tensor, squares: torch.Tensor):
        super().__init__()
        self.logps, self.squares = logps, squares

    def forward(self, **_: Any) -> SimpleNamespace:
        nothing = torch.zeros_like(self.squares)
        return SimpleNamespace(
            log_probs=self.logps,
            log_sum_sq_probs=self.squares,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            aux_loss=None,
        )


def run_dpo(case: dict[str, Any]) -> dict[str, Any]:
    """Loss, its gradient with respect to every token log-prob of the policy, and the metrics of the pairs."""
    dtype, settings = getattr(torch, case["dtype"]), {**DEFAULTS, **case["trl"]}
    policy, reference, squares = (padded(case[name], dtype) for name in ("policy", "reference", "squares"))
    lengths = torch.tensor([len(tokens) for tokens in case["policy"]])
    places = torch.arange(policy.shape[1] + 1)
    completion_mask = ((places >= 1) & (places <= lengths[:, None])).long()  # a prompt of one token
    policy.requires_grad_()
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.accelerator, trainer.model, trainer.ref_model = (
        Accelerator(cpu=True),
        GivenLogps(policy, squares),
        GivenLogps(reference, squares),
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings["discopop_tau"])
    trainer.precompute_ref_logps = settings.pop("precompute", False)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    trainer.model.train()
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    if trainer.precompute_ref_logps:
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.sum(1).chunk(2)
    loss = trainer._compute_loss(trainer.model, inputs, False)
    loss.backward()
    grads = [row[:length].tolist() for row, length in zip(policy.grad, lengths.tolist(), strict=True)]
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )
    return {
        "loss": loss.item(),
        "grads": grads,
        "metrics": {name: trainer._metrics["train"][name][0] for name in names},
    }


DEFAULTS: dict[str, Any] = {
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "aux_loss_enabled": False,
}


def run_cpo(case: dict[str, Any]) -> dict[str, Any]:
    """Loss of CPOTrainer: `losses.mean() + cpo_alpha * NLL`, where the NLL is a mean over the chosen
    completions' tokens.
    """
    dtype, settings = getattr(torch, case["dtype"]), dict(case["trl"])
    cpo_alpha = settings.pop("cpo_alpha", 0.0)
    defaults = {"beta": 0.1, "alpha": 0.0, "simpo_gamma": 0.5, "label_smoothing": 0.0}
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), **{**defaults, **settings})
    policy = padded(case["policy"], dtype).requires_grad_()
    lengths = torch.tensor([len(tokens) for tokens in case["policy"]])
    logps = policy.sum(1) / lengths if trainer.loss_type == "simpo" else policy.sum(1)
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *logps.chunk(2))
    num_pairs = len(losses)
    loss = losses.mean() - cpo_alpha * policy[:num_pairs].sum() / lengths[:num_pairs].sum()
    return _policy_only(loss, policy, lengths, chosen, rejected)


def run_orpo(case: dict[str, Any]) -> dict[str, Any]:
    """ORPOTrainer's odds ratio loss plus the mean NLL per token of each chosen completion (TRL's NLL also
    includes the prompt).
    """
    policy = padded(case["policy"], getattr(torch, case["dtype"])).requires_grad_()
    lengths = torch.tensor([len(tokens) for tokens in case["policy"]])
    means = policy.sum(1) / lengths
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), beta=case["trl"]["beta"])
    losses, chosen, rejected, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))
    return _policy_only(-means.chunk(2)[0].mean() - losses.mean(), policy, lengths, chosen, rejected)


def _policy_only(
    loss: torch.Tensor,
    policy: torch.Tensor,
    lengths: torch.Tensor,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
) -> dict[str, Any]:
    loss.backward()
    metrics = {"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item()}
    return {
        "loss": loss.item(),
        "grads": [row[:length].tolist() for row, length in zip(policy.grad, lengths.tolist(), strict=True)],
        "metrics": metrics,
    }


def padded(rows: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
    """Rows of unequal length, padded with zeros as in TRL's fused head."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def main() -> None:
    runners = {"dpo": run_dpo, "cpo": run_cpo, "orpo": run_orpo}
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: runners[case["trainer"]](case) for name, case in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
