"""What becomes of one family: scored and trained in every way, and compared with the model's own forward.

    outcome = check_family("mamba2")

The model is saved and loaded as a checkpoint. Expected log-probs come from `model(input_ids=...)` on one
unpadded row each, expected gradients from a plain loop over such rows; a layer-major run is compared with the
run of the same completions through all layers at once. Of a checkpoint with towers for images,
it is the whole model; see `towers.py` for what else is checked then.
"""

from __future__ import annotations

import json
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_cache.errors import DpoCacheError, first_line
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.memory.recompute import MODES
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.towers import loading_class
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.runner import Runner
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.types import Completion
from tests.families.layer_major import check_layer_major
from tests.families.tiny import MULTIMODAL, VOCAB, WITH_TOWERS, make_tiny
from tests.families.towers import saved_architectures, tower_problems

CPU = torch.device("cpu")
BUDGETS = (100, 2048)
MAX_GAP = 3e-4  # nats per token; weights of spread 0.3 amplify the rounding of float32
MAX_GRADIENT_GAP = 2e-3  # of the largest entry of the tensor's gradient

Gradients = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """How a family is run; `wrong` lists every result that is not exact and every error that is no refusal."""

    run: str = ""  # forest, rows, one row at a time, refused
    reason: str = ""  # why not the forest, or why refused
    training: str = ""  # exact, or why refused
    lora: str = ""
    layer_major: str = ""  # yes, or why not
    gap: float = 0.0  # the largest, nats per token
    gradient_gap: float = 0.0  # the largest, relative
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def note_gap(self, gap: float, where: str) -> None:
        self.gap = max(self.gap, gap)
        if not gap <= MAX_GAP:
            self.wrong.append(f"{where}: {gap:.2g} nats")

    def note_gradients(self, found: Gradients, own: Gradients, where: str) -> None:
        gap, name = gradient_gap(found, own)
        self.gradient_gap = max(self.gradient_gap, gap)
        if not gap <= MAX_GRADIENT_GAP:
            self.wrong.append(f"{where}: the gradient of {name} is off by {gap:.2g}")


def check_family(family: str, **changes: object) -> Outcome:
    """Score and train the tiny model of a family, or of a variant, in every way; `changes` are fields of its
    config.
    """
    outcome = Outcome()
    reason = _why_not_built(family) if family in WITH_TOWERS else ""
    if reason:
        return Outcome(run="not built", reason=reason)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _save(family, folder, changes)
        with _noting("scoring", outcome) as refused:
            _check_scores(folder, expected, outcome)
        if refused:
            outcome.run, outcome.reason = "refused", refused[0].replace(folder, "FOLDER")
            if "not causal" in outcome.reason and _is_causal(folder):
                outcome.wrong.append("scoring: its own forward is causal")
            return outcome
        for name, rank in (("training", 0), ("lora", 2)):
            with _noting(name, outcome) as refused:
                _check_training(folder, outcome, name, rank)
            setattr(outcome, name, refused[0] if refused else "exact")
        if MULTIMODAL.get(family) in saved_architectures(folder):
            with _noting("saving", outcome):
                outcome.wrong += tower_problems(folder)
    return outcome


def check_completions() -> list[Completion]:
    """Shared prompts, shared starts of answers, single tokens, rows of 3 to 90 tokens."""
    generator = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return generator.integers(3, VOCAB - 5, length).astype(np.uint32)  # without special tokens

    prompt, other, answer = ids(17), ids(33), ids(21)
    return [
        Completion(prompt, answer),
        Completion(prompt, np.concatenate([answer[:9], ids(12)])),
        Completion(np.concatenate([prompt, ids(5)]), ids(1)),
        Completion(other, ids(57)),
        Completion(other, ids(8)),
        Completion(ids(2), ids(1)),
        Completion(ids(3), ids(40)),
    ]


def check_pairs() -> list[Completion]:
    """Chosen and rejected completions, in turns; the second pair shares the prompt of the first and more."""
    one, other, longer, answer, *_ = check_completions()
    return [
        one,
        other,
        Completion(longer.prompt_ids, answer.completion_ids[:7]),
        Completion(longer.prompt_ids, answer.completion_ids[3:22]),
    ]


def own_logps(model: torch.nn.Module, completion: Completion) -> torch.Tensor:
    """The definition: log_softmax of the model's own forward on one unpadded row, float64 [T]."""
    ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[len(completion.prompt_ids) - 1 :, 0]


def preference_loss(logps: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of -log sigmoid of the margin; chosen and rejected completions take turns."""
    margins = (logps - references).view(-1, 2)
    return -F.logsigmoid(0.1 * (margins[:, 0] - margins[:, 1])).mean()


def gradient_gap(found: Gradients, own: Gradients) -> tuple[float, str]:
    """The largest gap, relative to the tensor's largest entry or to a thousandth of the largest of all."""
    largest = max(float(one.abs().max()) for one in own.values())
    gaps = [(0.0, "")]
    for name in found.keys() | own.keys():
        present = own.get(name, found.get(name))
        one, other = (values.get(name, torch.zeros_like(present)) for values in (found, own))
        gap = float((one - other).abs().max()) / max(float(other.abs().max()), 1e-3 * largest)
        gaps.append((gap if np.isfinite(gap) else np.inf, name))
    return max(gaps)


@contextmanager
def _noting(name: str, outcome: Outcome) -> Iterator[list[str]]:
    """Collect the refusal, if there is one; any other error is wrong."""
    refused: list[str] = []
    try:
        yield refused
    except DpoCacheError as error:
        refused.append(first_line(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        outcome.wrong.append(f"{name}: {type(error).__name__} at {place}: {first_line(error)}")


def _save(family: str, folder: str, changes: dict[str, object]) -> list[torch.Tensor]:
    """Save the family's tiny model; returns the log-probs of the completions by the model that transformers
    loads. Where transformers cannot make, load or run it: none.
    """
    try:
        make_tiny(family, **changes).save_pretrained(folder)
    except Exception:
        _save_config(family, folder)
        return []
    for kind in _kinds(folder):
        try:
            model = kind.from_pretrained(folder).eval()
            with torch.no_grad():
                return [own_logps(model, completion) for completion in check_completions()]
        except Exception:
            continue
    return []


def _kinds(folder: str) -> list[Any]:
    """The classes that load a checkpoint: that of the whole, if it has towers, and that of a causal LM."""
    wholes = [name for name in saved_architectures(folder) if name in MULTIMODAL.values()]
    lean = [loading_class(hf.AutoConfig.from_pretrained(folder))] if wholes else []  # where timm is missing
    return [*(getattr(hf, name) for name in wholes), hf.AutoModelForCausalLM, *lean]


def _why_not_built(family: str) -> str:
    """Why there is no tiny model of a family with towers."""
    try:
        make_tiny(family)
    except Exception as error:
        kind = getattr(hf, CONFIG_MAPPING_NAMES[family])
        is_encoder_decoder = bool(getattr(kind, "is_encoder_decoder", False))
        return (
            ""
            if is_encoder_decoder
            else f"no tiny model of it could be made ({type(error).__name__}: {_in_one_line(error)})"
        )
    return ""


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _save_config(family: str, folder: str) -> None:
    """A checkpoint whose config is the family's, for models that transformers cannot make."""
    name = MULTIMODAL[family] if family in WITH_TOWERS else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    fields = {"model_type": family, "architectures": [name]}
    Path(folder, "config.json").write_text(json.dumps(fields))
    save_file({"weight": torch.zeros(1)}, Path(folder, "model.safetensors"), {"format": "pt"})


@torch.no_grad()
def _is_causal(folder: str) -> bool:
    """Whether the log-probs of a row's first half stay the same under another second half."""
    model = _kinds(folder)[0].from_pretrained(folder).eval()
    one, other = check_completions()[3], check_completions()[6]
    changed = Completion(one.prompt_ids, np.concatenate([one.completion_ids[:17], other.completion_ids]))
    logps = [own_logps(model, completion)[:17] for completion in (one, changed)]
    return len(one) == len(changed) and bool((logps[0] - logps[1]).abs().max() < MAX_GAP)


def _load(folder: str) -> hf.PreTrainedModel:
    return load_model(folder, dtype=torch.float32, device=CPU)


def _check_scores(folder: str, expected: Sequence[torch.Tensor], outcome: Outcome) -> None:
    """Score as the engine chooses, and as plain rows, in chunks or batches of each budget."""
    completions, model = check_completions(), _load(folder)
    for requested in ("auto", "rows"):
        with in_eval_mode(model), prepared(model, log=outcome.remarks.append):
            choice = choose_attention(model, requested, max_length=max(map(len, completions)))
            if requested == "auto":
                outcome.run, outcome.reason = _describe(choice)
            for budget in BUDGETS:
                runner = Runner(model, "tiny", choice, Budget(budget, CPU, outcome.remarks.append))
                steps = runner.score(completions, rows_of=lambda row: [row])
                found = dict(entry for step in steps for entry in step.scores)
                gap = np.inf
                if expected:
                    gap = max(_gap(found[row].token_logps, one) for row, one in enumerate(expected))
                outcome.note_gap(gap, f"{requested}, budget {budget}")


def _describe(choice: AttentionChoice) -> tuple[str, str]:
    run = "one row at a time" if choice.max_rows == 1 else choice.name
    return run, "" if run == "forest" else choice.reason


def _gap(found: np.ndarray, expected: torch.Tensor) -> float:
    gap = float((torch.from_numpy(found).double() - expected).abs().max())
    return gap if np.isfinite(gap) else np.inf


def _check_training(folder: str, outcome: Outcome, name: str, rank: int) -> None:
    """Compare the gradients under each way to recompute with those of the plain loop; LoRA if `rank`."""
    model, completions = _load(folder), check_pairs()
    if rank:
        _add_lora(model, rank, outcome)

    def own_sums() -> torch.Tensor:
        return torch.stack([own_logps(model, completion).sum() for completion in completions])

    with torch.no_grad():
        references = own_sums() + torch.tensor([0.5, -1.5, 0.25, 2.0], dtype=torch.float64)
    own = _gradients(model, lambda: preference_loss(own_sums(), references))
    with in_eval_mode(model), prepared(model, trains=True, log=outcome.remarks.append) as now:
        policy = PolicyModel(model, choose_attention(model, max_length=max(map(len, completions))))
        for now.recomputation.mode in MODES:
            found = _gradients(model, lambda: preference_loss(policy([completions])[0].sums(), references))
            outcome.note_gradients(found, own, f"{name}, {now.recomputation.mode}")
        if not rank:
            now.recomputation.mode = "none"
            model.zero_grad(set_to_none=True)
            outcome.layer_major, wrong = check_layer_major(policy, completions)
            outcome.wrong += wrong


def _add_lora(model: hf.PreTrainedModel, rank: int, outcome: Outcome) -> None:
    """LoRA on all linear layers, with an update that is not zero."""
    config = lora_config(rank, None, "all-linear")
    adapted = add_adapter(model, config, seed=0, log=outcome.remarks.append)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)


def _gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Gradients:
    model.zero_grad(set_to_none=True)
    loss().backward()
    named = model.named_parameters()
    return {name: parameter.grad.double() for name, parameter in named if parameter.grad is not None}
