"""The policy as one module: completions in, log-probs of their tokens out, with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.device import autocast, planning_device_type, sum_dtype
from dpo_cache.lm.forest.layout import build_forest, count_forest_tokens
from dpo_cache.lm.kernels.head import head_token_logps, log_squared_probs, token_logps
from dpo_cache.lm.model.parts import head_of
from dpo_cache.lm.routing import Routing, add_routings, measure_routing
from dpo_cache.lm.rows import run_rows
from dpo_cache.lm.scoring import run_forest
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import Completion


class CompletionLogps(NamedTuple):
    """Log-probs of N completions under the policy: T tokens, in nats, completion after completion.

    A tuple, so that what wraps a module (DDP, FSDP2) finds the tensors in it.
    """

    tokens_T: torch.Tensor  # float32, with gradients
    lengths: list[int]  # [N], adding up to T
    # log of the sum over the vocabulary of squared probabilities; no gradients
    squares_T: torch.Tensor | None = None
    routing: Routing | None = None  # of a mixture of experts

    def sums(self, weights_T: torch.Tensor | None = None) -> torch.Tensor:
        """Log-prob of each completion, [N], float64 (float32 on MPS); `weights_T` weights its tokens."""
        shares_T = self.tokens_T.to(sum_dtype(self.tokens_T.device))
        return self._add_up(shares_T if weights_T is None else shares_T * weights_T)

    def excess_means(self) -> torch.Tensor:
        """Mean over each completion's tokens of `log p - log sum_v p(v)^2`, [N], detached.

        Needs `squares_T`.
        """
        assert self.squares_T is not None
        excess_T = (self.tokens_T.detach() - self.squares_T).to(sum_dtype(self.tokens_T.device))
        return self._add_up(excess_T) / torch.tensor(self.lengths, device=excess_T.device)

    def detach(self) -> CompletionLogps:
        """The same values as leaves, which collect gradients for `backward`."""
        return self._replace(
            tokens_T=self.tokens_T.detach().requires_grad_(),
            routing=self.routing and self.routing.detach(),
        )

    def backward(self, detached: CompletionLogps) -> None:
        """Continue into the model with the gradients that `detached`, of the same completions, has
        collected.
        """
        sides = [(self.tokens_T, detached.tokens_T)]
        if self.routing and detached.routing:
            sides.append((self.routing.probs_E, detached.routing.probs_E))
        torch.autograd.backward([one for one, _ in sides], [other.grad for _, other in sides])

    def _add_up(self, values_T: torch.Tensor) -> torch.Tensor:
        owners_T = torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths)).to(values_T.device)
        return values_T.new_zeros(len(self.lengths)).index_add(0, owners_T, values_T)


class PolicyModel(torch.nn.Module):
    """A causal LM that maps completions to the log-probs of their tokens, its head included.

    Training calls the model through this module and in no other way, so whatever wraps a module can wrap the
    policy: DDP reduces its gradients, FSDP2 shards it.

    Args:
        model: the causal LM, set to the attention that was chosen for it.
        attention: how the model is run, as `choose_attention` returned it.
        precision: fp32, bf16-mixed or bf16; bf16-mixed runs the model under autocast.
        with_squares: also return `squares_T`, which costs another product with the head.
        with_routing: also return the routing of a mixture of experts, which must return router logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: AttentionChoice,
        *,
        precision: str = "fp32",
        with_squares: bool = False,
        with_routing: bool = False,
    ):
        super().__init__()
        self.model: PreTrainedModel = model
        self.attention, self.precision = attention, precision
        self._outputs = {"with_squares": with_squares, "with_routing": with_routing}
        self.train(model.training)

    def forward(
        self, parts: Sequence[Sequence[Completion]] = (), *, generate: Mapping[str, Any] | None = None
    ) -> Any:
        """Log-probs of the completions of each part, `[CompletionLogps, ...]`.

        A part is run at once: as one forest, or as rows. One part of a step or all of its parts may be given.
        With
        `generate`, the output of `model.generate(**generate)` instead: answers are written through this call,
        too.
        """
        if generate is not None:
            with autocast(self.model.device, self.precision, keeps_copies=True):
                return self.model.generate(**generate)  # type: ignore[operator]  # mypy: Tensor | Module
        with autocast(self.model.device, self.precision):
            return [completion_logps(self.model, part, self.attention, **self._outputs) for part in parts]

    def count_tokens(self, completions: Sequence[Completion]) -> int:
        """Tokens that a part of these completions runs: those of its forest, or of its rows with their
        padding.
        """
        if self.attention.name == "forest":
            return count_forest_tokens(completions)
        lengths = [len(completion) for completion in completions]
        return sum(lengths) if self.attention.max_rows == 1 else max(lengths) * len(lengths)


def completion_logps(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    *,
    with_squares: bool = False,
    with_routing: bool = False,
) -> CompletionLogps:
    """Log-probs of each completion's tokens, as `log_softmax(logits.float(), -1)` has them.

    Prefixes that completions share are run once, in one flat row without padding, where the model takes the
    forest.
    """
    if attention.name == "forest":
        hidden_TD, targets_T, places_T, routing = _run_forest(model, completions, with_routing)
        tokens_T = _target_logps(model, hidden_TD, targets_T, attention).index_select(0, places_T)
        squares_T = _log_squares(model, hidden_TD).index_select(0, places_T) if with_squares else None
        return CompletionLogps(
            tokens_T, [completion.num_tokens for completion in completions], squares_T, routing
        )
    size = attention.max_rows or len(completions)
    batches = [completions[start : start + size] for start in range(0, len(completions), size)]
    return join_logps([_row_logps(model, batch, with_squares, with_routing) for batch in batches])


def _run_forest(
    model: PreTrainedModel, completions: Sequence[Completion], with_routing: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routing | None]:
    """Hidden states that predict the forest's T targets, the targets, and for each completion's tokens their
    places among them.
    """
    forest, device = build_forest(completions), model.device
    outputs = run_forest(model, forest, **({"output_router_logits": True} if with_routing else {}))
    targets = np.flatnonzero(forest.is_target_L())
    hidden_TD = outputs[0][0].index_select(0, torch.from_numpy(forest.parents_L[targets]).to(device))
    places = np.searchsorted(targets, np.concatenate(forest.targets))
    routing = (
        _routing(model, outputs.router_logits, torch.from_numpy(forest.uses_L()).to(device))
        if with_routing
        else None
    )
    return (
        hidden_TD,
        torch.from_numpy(forest.tokens_L[targets]).to(device),
        torch.from_numpy(places).to(device),
        routing,
    )


def _row_logps(
    model: PreTrainedModel, completions: Sequence[Completion], with_squares: bool, with_routing: bool
) -> CompletionLogps:
    rows = run_rows(model, completions, **({"output_router_logits": True} if with_routing else {}))
    tokens_T = token_logps(
        rows.predictors_TD, head_of(model), rows.targets_T, model.config.get_text_config().vocab_size
    )
    squares_T = _log_squares(model, rows.predictors_TD) if with_squares else None
    routing = _routing(model, rows.outputs.router_logits, rows.mask.flatten()) if with_routing else None
    return CompletionLogps(
        tokens_T, [completion.num_tokens for completion in completions], squares_T, routing
    )


def join_logps(parts: Sequence[CompletionLogps]) -> CompletionLogps:
    """The log-probs of several lists of completions as those of one; gradients flow back into the parts."""
    if len(parts) == 1:
        return parts[0]
    lengths = [length for part in parts for length in part.lengths]
    squares = [part.squares_T for part in parts if part.squares_T is not None]
    routings = [part.routing for part in parts if part.routing]
    return CompletionLogps(
        torch.cat([part.tokens_T for part in parts]),
        lengths,
        torch.cat(squares) if squares else None,
        add_routings(routings) if routings else None,
    )


def _routing(
    model: PreTrainedModel, router_logits: Sequence[torch.Tensor], weights_L: torch.Tensor
) -> Routing:
    return measure_routing(router_logits, weights_L, model.config.get_text_config().num_experts_per_tok)


def _log_squares(model: PreTrainedModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    return log_squared_probs(hidden_TD, head_of(model), model.config.get_text_config().vocab_size)


def _target_logps(
    model: PreTrainedModel, hidden_TD: torch.Tensor, targets_T: torch.Tensor, attention: AttentionChoice
) -> torch.Tensor:
    if attention.has_plain_head and torch.is_grad_enabled():
        return head_token_logps(hidden_TD, model.get_output_embeddings(), targets_T)
    return token_logps(hidden_TD, head_of(model), targets_T, model.config.get_text_config().vocab_size)


def default_micro_tokens(device: torch.device) -> int:
    """Tokens run at once with gradients: enough for matrix products at full speed; their activations are what
    memory holds.
    """
    return 1024 if planning_device_type(device) == "cpu" else 4096
