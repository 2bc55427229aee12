"""A model that scores completions: `precompute`, `verify --rescore` and `eval` run theirs through this file.

    with open_runner("path/to/model", dtype=torch.float32, device=device, max_length=1024) as runner:
        for step in runner.score(completions, rows_of=lambda index: [index]):
            step.scores  # [(position among the completions, Score), ...]

load -> prove the attention -> choose the chunk size -> score -> refuse what is not finite
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError, shown_rows
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.prepare import prepared
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.log import Log, log_remark
from dpo_cache.types import Completion, Score

RowsOf = Callable[[int], Sequence[object]]  # position of a completion -> the rows that hold it, for errors


@dataclass(frozen=True)
class Runner:
    """A model that is ready to score: its attention is proved, its chunk size is found while it runs."""

    model: PreTrainedModel
    name: str  # of the model, for errors
    attention: AttentionChoice
    budget: Budget

    def score(self, completions: Sequence[Completion], *, rows_of: RowsOf) -> Iterator[ScoringStep]:
        """Yield the scores chunk by chunk, each completion's once, in any order.

        Raises `ModelError`, which names the rows, for a log-prob that is NaN or infinite: the chunk that has
        it is not yielded. Raises `ModelError` also where memory runs out even for small chunks.
        """
        for step in score_completions(self.model, completions, self.attention, self.budget):
            self._check_finite(step.scores, completions, rows_of)
            yield step

    def _check_finite(
        self, scores: Sequence[tuple[int, Score]], completions: Sequence[Completion], rows_of: RowsOf
    ) -> None:
        broken = [index for index, score in scores if not _is_finite(score)]
        if not broken:
            return
        # one completion's NaN can spread to others of its chunk
        culprits = [index for index in broken if self._is_broken_by_itself(completions[index])]
        rows = list(dict.fromkeys(row for index in culprits or broken for row in rows_of(index)))
        rows.sort()  # type: ignore[type-var]
        where = f"row{'s' if len(rows) > 1 else ''} {shown_rows(rows)}"
        raise ModelError(
            f"{self.name} gives a log-prob that is NaN or infinite for {where}"
            f"{'' if culprits else ', or for a row that was computed in the same chunk'}.\n"
            f"{_likely_cause(self.model.dtype)} The scores of this chunk are discarded."
        )

    def _is_broken_by_itself(self, completion: Completion) -> bool:
        budget = Budget(self.budget.tokens, self.model.device, lambda _: None)
        steps = score_completions(self.model, [completion], self.attention, budget)
        return not all(_is_finite(score) for step in steps for _, score in step.scores)


@contextmanager
def open_runner(
    location: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str = "none",
    attention: str = "auto",
    max_length: int,
    budget_tokens: int | None = None,
    log: Log = log_remark,
) -> Iterator[Runner]:
    """Load the model at a local folder or Hub id and make it ready to score sequences up to `max_length`.

    See `load_model` for what is loaded and `run_loaded` for the rest. Raises `ModelError`.
    """
    model = load_model(
        location,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
    )
    with run_loaded(
        model,
        name=location,
        attention=attention,
        max_length=max_length,
        budget_tokens=budget_tokens,
        log=log,
    ) as runner:
        yield runner


@contextmanager
def run_loaded(
    model: PreTrainedModel,
    *,
    name: str,
    attention: str = "auto",
    max_length: int,
    budget_tokens: int | None = None,
    log: Log = log_remark,
) -> Iterator[Runner]:
    """Make a loaded model ready to score; on leaving, it is as it was before.

    `attention` is auto, forest or rows, see `choose_attention`; `budget_tokens` are run at once, None finds a
    good number in the first chunks. `log` gets a remark if auto has to take padded rows.
    """
    training = {module: module.training for module in model.modules()}
    try:
        with prepared(model.eval(), log=log):
            choice = choose_attention(model, attention, max_length=max_length)
            if choice.name == "rows" and attention == "auto":
                log(f"{type(model).__name__} is run as plain padded rows, which is slower: {choice.reason}.")
            yield Runner(model, name, choice, Budget(budget_tokens, model.device, log))
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _is_finite(score: Score) -> bool:
    return bool(np.isfinite(score.token_logps).all())


def _likely_cause(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "float16 overflows beyond 65,504, or its weights are damaged. Use bfloat16 or float32."
    if dtype == torch.bfloat16:
        return "Its weights may be damaged, or bfloat16 too coarse for it. Use float32."
    return "Its weights may be damaged. Download or save the model again."
