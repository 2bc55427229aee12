"""A model that scores completions: `precompute`, `verify --rescore` and `eval` run theirs through this file.

    with open_runner("path/to/model", dtype=torch.float32, device=device, max_length=1024) as runner:
        for step in runner.score(completions, rows_of=lambda index: [index]):
            step.scores  # [(position among the completions, Score), ...]

load -> check the attention -> choose the chunk size -> score -> refuse log-probs that are not finite
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
from dpo_cache.lm.device import check_one_device
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.self_check import (
    STREAM,
    AttentionChoice,
    choose_attention,
    score_completions,
)
from dpo_cache.log import Log, log_remark
from dpo_cache.types import LOWEST_LOGP, Completion, Score, are_logps

CAUSE = "Its weights may be damaged. Download or save the model again."
CAUSES_BY_DTYPE = {
    torch.float16: "float16 overflows beyond 65,504, or its weights are damaged. Use bfloat16 or float32.",
    torch.bfloat16: "Its weights may be damaged, or bfloat16 too coarse for it. Use float32.",
}

RowsOf = Callable[[int], Sequence[object]]  # position of a completion -> the rows that hold it, for errors


@dataclass(frozen=True)
class Runner:
    """A model that is ready to score: its attention is checked, its chunk size is found while it runs."""

    model: PreTrainedModel
    name: str  # of the model, for errors
    attention: AttentionChoice
    budget: Budget

    def score(self, completions: Sequence[Completion], *, rows_of: RowsOf) -> Iterator[ScoringStep]:
        """Yield the scores chunk by chunk, each completion's once, in any order.

        Raises `ModelError`, which names the rows, for a log-prob that is NaN or infinite, instead of yielding
        its chunk. Raises `ModelError` also where memory runs out even for small chunks.
        """
        for step in score_completions(self.model, completions, self.attention, self.budget):
            if broken := {index: score for index, score in step.scores if not are_logps(score.token_logps)}:
                raise self._unusable(broken, completions, rows_of)
            yield step

    def _unusable(
        self, broken: dict[int, Score], completions: Sequence[Completion], rows_of: RowsOf
    ) -> ModelError:
        is_finite = all(np.isfinite(score.token_logps).all() for score in broken.values())
        what = f"below {LOWEST_LOGP:,.0f} nats" if is_finite else "NaN or infinite"
        # one completion's NaN can spread to others of its chunk
        culprits = [index for index in broken if self._is_broken_by_itself(completions[index])]
        found = {row for index in culprits or broken for row in rows_of(index)}
        rows = sorted(found)  # type: ignore[type-var]
        where = f"row{'s' if len(rows) > 1 else ''} {shown_rows(rows)}"
        return ModelError(
            f"{self.name} gives a log-prob that is {what} for {where}"
            f"{'' if culprits else ', or for a row that was computed in the same chunk'}.\n"
            f"{CAUSES_BY_DTYPE.get(self.model.dtype, CAUSE)} The scores of this chunk are discarded."
        )

    def _is_broken_by_itself(self, completion: Completion) -> bool:
        budget = Budget(self.budget.tokens, self.model.device, lambda _: None)
        steps = score_completions(self.model, [completion], self.attention, budget)
        return not all(are_logps(score.token_logps) for step in steps for _, score in step.scores)


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
    run_tokens: int | None = None,
    ways: Sequence[str] = (STREAM,),
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
        run_tokens=run_tokens,
        ways=ways,
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
    run_tokens: int | None = None,
    ways: Sequence[str] = (STREAM,),
    log: Log = log_remark,
) -> Iterator[Runner]:
    """Make a loaded model ready to score; on leaving, it is as it was before.

    `attention` is auto, forest or rows, see `choose_attention`, as for `run_tokens` and `ways`;
    `budget_tokens` are run at once, None finds a good number in the first chunks. `log` gets a remark if auto
    chooses plain rows, and if chunks must be smaller than the budget. Raises `ModelError`.
    """
    check_one_device(model)
    with in_eval_mode(model), prepared(model, log=log):
        choice = choose_attention(
            model,
            attention,
            max_length=max_length,
            chunk_tokens=budget_tokens,
            run_tokens=run_tokens,
            ways=ways,
        )
        if remark := choice.remark(model, is_requested=attention == "rows"):
            log(remark)
        yield Runner(model, name, choice, Budget(budget_tokens, model.device, log))
