"""A model that scores completions: `precompute`, `verify --rescore` and `eval` run theirs through this file.

    with open_runner("path/to/model", dtype=torch.float32, device=device, max_length=1024) as runner:
        for step in runner.score(completions, rows_of=lambda index: [index]):
            step.scores  # [(position among the completions, Score), ...]

load -> check the attention -> choose the chunk size -> score -> refuse log-probs that are not finite
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError, shown_rows
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.device import check_one_device
from dpo_cache.lm.layerwise.check import find_layer_major
from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError
from dpo_cache.lm.layerwise.own_forward import Wanted, own_logps_together
from dpo_cache.lm.layerwise.scoring import score_layer_major
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.own_forward import own_logps_at
from dpo_cache.lm.prepare import in_eval_mode, prepared
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.self_check import (
    STREAM,
    AttentionChoice,
    choose_attention,
    score_completions,
)
from dpo_cache.lm.streaming import Streaming
from dpo_cache.log import Log, log_remark
from dpo_cache.types import LOWEST_LOGP, Completion, Score, are_logps

CAUSE = "Its weights may be damaged. Download or save the model again."
CAUSES_BY_DTYPE = {
    torch.float16: "float16 overflows beyond 65,504, or its weights are damaged. Use bfloat16 or float32.",
    torch.bfloat16: "Its weights may be damaged, or bfloat16 too coarse for it. Use float32.",
}

# Run at once where weights are streamed; the speed of a size cannot be found chunk by chunk
STREAMED_TOKENS = {"cpu": 512, "cuda": 8192, "mps": 1024}

RowsOf = Callable[[int], Sequence[object]]  # position of a completion -> the rows that hold it, for errors


@dataclass(frozen=True)
class Runner:
    """A model that is ready to score: its attention is checked, its chunk size is found while it runs."""

    model: PreTrainedModel
    name: str  # the model's, for errors
    attention: AttentionChoice
    budget: Budget
    layer_major: LayerMajor | None = None  # only for a model whose weights are streamed

    def score(self, completions: Sequence[Completion], *, rows_of: RowsOf) -> Iterator[ScoringStep]:
        """Yield the scores chunk by chunk, each completion's once, in any order.

        Raises `ModelError`, which names the rows, for a log-prob that is NaN or infinite, instead of yielding
        its chunk. Raises `ModelError` also where memory runs out even for small chunks.
        """
        for step in self._steps(completions):
            if broken := {index: score for index, score in step.scores if not are_logps(score.token_logps)}:
                raise self._unusable(broken, completions, rows_of)
            yield step

    def own_logps(self, wanted: Sequence[Wanted]) -> list[torch.Tensor]:
        """Log-probs by the model's own forward on one plain row each: float32 [N] of some of its tokens, on
        the CPU. One reading of the weights where they are streamed.
        """
        original = self.attention.original
        if self.layer_major is not None:
            return own_logps_together(self.model, wanted, self.layer_major, original)
        return [own_logps_at(self.model, completion, places_N, original) for completion, places_N in wanted]

    def _steps(self, completions: Sequence[Completion]) -> Iterator[ScoringStep]:
        if self.layer_major is None:
            return score_completions(self.model, completions, self.attention, self.budget)
        return score_layer_major(self.model, completions, self.attention, self.budget, self.layer_major)

    def _unusable(
        self, broken: dict[int, Score], completions: Sequence[Completion], rows_of: RowsOf
    ) -> ModelError:
        is_finite = all(np.isfinite(score.token_logps).all() for score in broken.values())
        what = f"below {LOWEST_LOGP:,.0f} nats" if is_finite else "NaN or infinite"
        # one completion's NaN can spread to others of its chunk
        culprits = self._broken_by_themselves({index: completions[index] for index in broken})
        found = {row for index in culprits or broken for row in rows_of(index)}
        rows = sorted(found)  # type: ignore[type-var]
        where = f"row{'s' if len(rows) > 1 else ''} {shown_rows(rows)}"
        return ModelError(
            f"{self.name} gives a log-prob that is {what} for {where}"
            f"{'' if culprits else ', or for a row that was computed in the same chunk'}.\n"
            f"{CAUSES_BY_DTYPE.get(self.model.dtype, CAUSE)} The scores of this chunk are discarded."
        )

    def _broken_by_themselves(self, completions: dict[int, Completion]) -> list[int]:
        if self.layer_major is not None:
            wanted = [(one, np.arange(one.num_tokens)) for one in completions.values()]
            logps = self.own_logps(wanted)
            return [
                index
                for index, values in zip(completions, logps, strict=True)
                if not are_logps(values.numpy())
            ]
        return [index for index, one in completions.items() if self._is_broken_by_itself(one)]

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
    streaming: Streaming | None = None,
    device_map: str = "off",
    log: Log = log_remark,
) -> Iterator[Runner]:
    """Load the model at a local folder or Hub id and make it ready to score sequences up to `max_length`.

    See `load_model` for what is loaded and `run_loaded` for the rest. With `streaming`, the weights are read
    for each window of chunks; with `device_map` auto, the model is spread, see `load_dispatched`. Raises
    `ModelError`.
    """
    loading: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "quantize": quantize,
    }
    running: dict[str, Any] = {
        "name": location,
        "attention": attention,
        "max_length": max_length,
        "budget_tokens": budget_tokens,
        "run_tokens": run_tokens,
        "ways": ways,
        "log": log,
    }
    with ExitStack() as stack:
        runner = None
        if device_map == "auto":
            runner = _open_dispatched(stack, location, loading, running)
        elif streaming is not None:
            runner = _open_streamed(stack, location, streaming, loading, running)
        if runner is None:
            runner = stack.enter_context(run_loaded(load_model(location, **loading), **running))
        yield runner


def _open_dispatched(
    stack: ExitStack, location: str, loading: dict[str, Any], running: dict[str, Any]
) -> Runner:
    """The runner of a model that is spread, until `stack` is closed."""
    from dpo_cache.lm.model.load_dispatched import (
        describe_places,
        load_dispatched,
    )  # imports accelerate's hooks

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dpo-cache-weights-"))
    model = load_dispatched(location, offload_folder=folder, **loading)
    running["log"](f"the model is spread: {describe_places(model)}.")
    return stack.enter_context(run_loaded(model, **running))


def _open_streamed(
    stack: ExitStack,
    location: str,
    streaming: Streaming,
    loading: dict[str, Any],
    running: dict[str, Any],
) -> Runner | None:
    """The runner of a streamed model, until `stack` is closed; None for a model that cannot be streamed, if
    it need not be.
    """
    try:
        model, weights = load_streamed(
            location, weights=streaming.place, embedding=streaming.embedding, **loading
        )
    except ModelError as error:
        if streaming.is_required:
            raise
        reason, *_ = str(error).splitlines()
        running["log"](f"the weights are kept on the device: {reason}")
        return None
    with ExitStack() as opened:
        opened.callback(weights.close)
        try:
            layer_major = find_layer_major(model, weights, streaming.window_bytes)
            runner = opened.enter_context(run_loaded(model, layer_major=layer_major, **running))
        except NotLayerMajorError as error:
            if streaming.is_required:
                raise ModelError(
                    f"{location} cannot run layer by layer, so its weights cannot be streamed: {error}.\n"
                    "Leave `stream_weights` out, or set it to off."
                ) from error
            running["log"](
                f"the weights are kept on the device: {location} cannot run layer by layer ({error})."
            )
            return None
        stack.enter_context(opened.pop_all())
    return runner


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
    layer_major: LayerMajor | None = None,
    log: Log = log_remark,
) -> Iterator[Runner]:
    """Make a loaded model ready to score; on leaving, it is as it was before.

    `attention` is auto, forest or rows, see `choose_attention`, as for `run_tokens` and `ways`;
    `budget_tokens` are run at once, None finds a good number in the first chunks. `layer_major` runs a model
    whose weights are streamed. `log` gets a remark if auto chooses plain rows, and if chunks must be smaller
    than the budget. Raises `ModelError`, and `NotLayerMajorError` only with `layer_major`.
    """
    check_one_device(model)
    if layer_major is not None:
        budget_tokens = budget_tokens or STREAMED_TOKENS[model.device.type]
    with in_eval_mode(model), prepared(model, log=log):
        choice = choose_attention(
            model,
            attention,
            max_length=max_length,
            chunk_tokens=budget_tokens,
            run_tokens=run_tokens,
            ways=ways,
            layer_major=layer_major,
        )
        if remark := choice.remark(model, is_requested=attention == "rows"):
            log(remark)
        yield Runner(model, name, choice, Budget(budget_tokens, model.device, log), layer_major)
