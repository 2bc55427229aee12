"""Log-probs of completions with gradients: what the training loop asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.device import planning_device_type, sum_dtype
from dpo_cache.lm.forest.layout import build_forest, count_forest_tokens
from dpo_cache.lm.kernels.head import head_token_logps, log_squared_probs, token_logps
from dpo_cache.lm.model.parts import head_of
from dpo_cache.lm.routing import Routing, add_routings, measure_routing
from dpo_cache.lm.rows import run_rows
from dpo_cache.lm.scoring import run_forest
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import Completion


@dataclass(frozen=True)
class CompletionLogps:
    """What the policy says of N completions: T token log-probs in nats, completion after completion."""

    tokens_T: torch.Tensor  # float32, with gradients
    lengths: list[int]  # [N], adding up to T
    squares_T: torch.Tensor | None = (
        None  # log of the sum over the vocabulary of squared probabilities; no gradients
    )
    routing: Routing | None = None  # of a mixture of experts

    def sums(self, weights_T: torch.Tensor | None = None) -> torch.Tensor:
        """Log-prob of each completion, [N], float64 (float32 on MPS), its tokens weighted if weights are
        given.
        """
        shares_T = self.tokens_T.to(sum_dtype(self.tokens_T.device))
        return self._add_up(shares_T if weights_T is None else shares_T * weights_T)

    def excess_means(self) -> torch.Tensor:
        """Mean over each completion's tokens of `log p - log sum_v p(v)^2`, [N], detached; needs
        `squares_T`.
        """
        assert self.squares_T is not None
        excess_T = (self.tokens_T.detach() - self.squares_T).to(sum_dtype(self.tokens_T.device))
        return self._add_up(excess_T) / torch.tensor(self.lengths, device=excess_T.device)

    def detach(self) -> CompletionLogps:
        """The same values, which collect a gradient of their own: what `backward` takes."""
        return replace(
            self,
            tokens_T=self.tokens_T.detach().requires_grad_(),
            routing=self.routing and self.routing.detach(),
        )

    def backward(self, detached: CompletionLogps) -> None:
        """Carry the gradient that `detached`, of the same completions, has collected on into the model."""
        sides = [(self.tokens_T, detached.tokens_T)]
        if self.routing and detached.routing:
            sides.append((self.routing.probs_E, detached.routing.probs_E))
        torch.autograd.backward([own for own, _ in sides], [other.grad for _, other in sides])

    def _add_up(self, values_T: torch.Tensor) -> torch.Tensor:
        owners_T = torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths)).to(values_T.device)
        return values_T.new_zeros(len(self.lengths)).index_add(0, owners_T, values_T)


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
    `with_squares` costs another product with the head; `with_routing` needs a model that returns router
    logits.
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


def count_tokens(completions: Sequence[Completion], attention: AttentionChoice) -> int:
    """Tokens that `completion_logps` runs through the model: of the forest, or of the rows with their
    padding.
    """
    if attention.name == "forest":
        return count_forest_tokens(completions)
    lengths = [len(completion.sequence_ids) for completion in completions]
    return sum(lengths) if attention.max_rows == 1 else max(lengths) * len(lengths)


def default_micro_tokens(device: torch.device) -> int:
    """Tokens run at once with gradients: enough for matrix products at full speed; their activations are what
    memory holds.
    """
    return 1024 if planning_device_type(device) == "cpu" else 4096
