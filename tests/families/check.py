"""What one family does: scored and trained in every way that the library has, compared with its own forward.

    outcome = check_family("mamba2")

Expected log-probs come from `model(input_ids=...)` of one unpadded row each, expected gradients from a plain
loop over such rows. The model that is run was saved and loaded as a checkpoint.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf

from dpo_cache.errors import DpoCacheError, first_line
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.memory.recompute import MODES
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.runner import Runner
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.types import Completion
from tests.families.tiny import VOCAB, make_tiny

CPU = torch.device("cpu")
BUDGETS = (100, 2048)
MAX_GAP = 3e-4  # nats per token; weights of spread 0.3 amplify the rounding of float32
MAX_GRADIENT_GAP = 2e-3  # of the largest entry of the tensor's gradient

Gradients = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """How a family was run, and what was wrong; gaps are the largest ones."""

    run: str = ""  # forest, rows, one row at a time, refused
    reason: str = ""  # why not the forest, or why refused
    training: str = ""  # exact, or why refused
    lora: str = ""
    gap: float = 0.0
    gradient_gap: float = 0.0
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_family(family: str, *, lora: bool = True, **changes: object) -> Outcome:
    """Score and train the family's tiny model in every way."""
    outcome = Outcome()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = _save(family, folder, changes)
            _check_scores(folder, expected, outcome)
            outcome.training = _check_training(folder, outcome)
            outcome.lora = _check_training(folder, outcome, rank=2) if lora else ""
    except DpoCacheError as error:
        outcome.run, outcome.reason = "refused", first_line(error)
    return outcome


def check_completions() -> list[Completion]:
    """Shared prompts, shared starts of answers, single tokens, rows of 3 to 90 tokens."""
    generator = np.random.default_rng(0)
    system, other = (generator.integers(3, VOCAB - 5, size).astype(np.uint32) for size in (17, 33))

    def ids(length: int) -> np.ndarray:
        return generator.integers(3, VOCAB - 5, length).astype(np.uint32)

    answer = ids(21)
    return [
        Completion(system, answer),
        Completion(system, np.concatenate([answer[:9], ids(12)])),
        Completion(np.concatenate([system, ids(5)]), ids(1)),
        Completion(other, ids(57)),
        Completion(other, ids(8)),
        Completion(ids(2), ids(1)),
        Completion(ids(3), ids(40)),
    ]


def check_pairs() -> list[tuple[Completion, Completion]]:
    """Chosen and rejected answers; the second pair shares the start of the first one's prompt."""
    one, other, two, three, *_ = check_completions()
    short = Completion(two.prompt_ids, three.completion_ids[:7])
    return [(one, other), (short, Completion(two.prompt_ids, three.completion_ids[3:22]))]


def own_logps(model: torch.nn.Module, completion: Completion) -> torch.Tensor:
    """The definition: log_softmax of the model's own forward on one unpadded row, float64 [T]."""
    ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[len(completion.prompt_ids) - 1 :, 0]


def preference_loss(logps: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid over pairs; chosen and rejected completions take turns."""
    margins = (logps - references).view(-1, 2)
    return -F.logsigmoid(0.1 * (margins[:, 0] - margins[:, 1])).mean()


def _save(family: str, folder: str, changes: dict[str, object]) -> list[torch.Tensor]:
    """Save the family's tiny model; returns its own log-probs of the completions."""
    model = make_tiny(family, **changes)
    model.save_pretrained(folder)
    with torch.no_grad():
        return [own_logps(model, completion) for completion in check_completions()]


def _load(folder: str) -> hf.PreTrainedModel:
    return load_model(folder, dtype=torch.float32, device=CPU)


def _check_scores(folder: str, expected: list[torch.Tensor], outcome: Outcome) -> None:
    completions = check_completions()
    model = _load(folder)
    for requested in ("auto", "rows"):
        with in_eval_mode(model), prepared(model, log=outcome.remarks.append):
            choice = choose_attention(model, requested, max_length=max(map(len, completions)))
            if requested == "auto":
                outcome.run = "one row at a time" if choice.max_rows == 1 else choice.name
                outcome.reason = "" if choice.name == "forest" else choice.reason
            for budget in BUDGETS:
                runner = Runner(model, "tiny", choice, Budget(budget, CPU, outcome.remarks.append))
                found = dict(
                    entry
                    for step in runner.score(completions, rows_of=lambda row: [row])
                    for entry in step.scores
                )
                gap = max(
                    float((torch.from_numpy(found[row].token_logps).double() - one).abs().max())
                    for row, one in enumerate(expected)
                )
                outcome.gap = max(outcome.gap, gap)
                if not gap <= MAX_GAP:
                    outcome.wrong.append(f"{choice.name} ({requested}), budget {budget}: {gap:.2g} nats")


def _check_training(folder: str, outcome: Outcome, rank: int = 0) -> str:
    """Compare the gradients of every mode with those of the plain loop; returns `exact` or why it is refused."""
    model, name = _load(folder), "lora" if rank else "training"
    if rank:
        try:
            _add_lora(model, rank)
        except DpoCacheError as error:
            return first_line(error)
    completions = [completion for pair in check_pairs() for completion in pair]
    with torch.no_grad():
        references = torch.stack([own_logps(model, one).sum() for one in completions])
    references = references + torch.tensor([0.5, -1.5, 0.25, 2.0], dtype=torch.float64)
    own = _gradients(
        model,
        lambda: preference_loss(
            torch.stack([own_logps(model, one).sum() for one in completions]), references
        ),
    )
    with in_eval_mode(model), prepared(model, trains=True, log=outcome.remarks.append) as now:
        choice = choose_attention(model, max_length=max(map(len, completions)))
        policy = PolicyModel(model, choice)
        for mode in MODES:
            now.recomputation.mode = mode
            found = _gradients(model, lambda: preference_loss(policy([completions])[0].sums(), references))
            gap, where = _gradient_gap(found, own)
            outcome.gradient_gap = max(outcome.gradient_gap, gap)
            if not gap <= MAX_GRADIENT_GAP:
                outcome.wrong.append(f"{name} {mode}: gradient of {where} is off by {gap:.2g}")
    return "exact"


def _add_lora(model: hf.PreTrainedModel, rank: int) -> None:
    """LoRA on all linear layers that is not zero."""
    adapted = add_adapter(model, lora_config(rank, None, "all-linear"), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)


def _gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Gradients:
    model.zero_grad(set_to_none=True)
    loss().backward()
    return {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _gradient_gap(found: Gradients, own: Gradients) -> tuple[float, str]:
    """The largest gap, relative to the tensor's largest entry or to a thousandth of the largest of all."""
    largest = max(float(one.abs().max()) for one in own.values())
    gaps = [(0.0, "")]
    for name in found.keys() | own.keys():
        present = own.get(name, found.get(name))
        one, other = (values.get(name, torch.zeros_like(present)) for values in (found, own))
        scale = max(float(other.abs().max()), 1e-3 * largest)
        gap = float((one - other).abs().max()) / scale
        gaps.append((gap if np.isfinite(gap) else np.inf, name))
    return max(gaps)
