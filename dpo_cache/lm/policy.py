"""The policy as one module: completions in, log-probs of their tokens out, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.device import autocast, planning_device_type, sum_dtype, to_device
from dpo_cache.lm.forest.layout import build_forest, count_forest_tokens, split_by_tokens
from dpo_cache.lm.kernels.head import head_token_logps, log_squared_probs, token_logps
from dpo_cache.lm.model.parts import Head, decoder_of, head_of
from dpo_cache.lm.routing import Routing, add_routings, measure_routing
from dpo_cache.lm.rows import DecoderPass, RunOutput, rows_pass, run_whole
from dpo_cache.lm.scoring import forest_arguments
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.lm.sharded import ShardedModel
from dpo_cache.types import Completion


class CompletionLogps(NamedTuple):
    """Log-probs of N completions under the policy: T tokens, in nats, completion after completion.

    A tuple, so that wrappers of modules (DDP, FSDP2) find the tensors in it.
    """

    tokens_T: torch.Tensor  # float32, with gradients
    lengths: list[int]  # [N], adding up to T
    # log of the sum over the vocabulary of squared probabilities; no gradients
    squares_T: torch.Tensor | None = None
    routing: Routing | None = None  # only for a mixture of experts

    def sums(self, weights_T: torch.Tensor | None = None) -> torch.Tensor:
        """Log-prob of each completion, [N], float64 (float32 on MPS); `weights_T` weights its tokens."""
        return self._add_up(self.tokens_T if weights_T is None else self.tokens_T * weights_T)

    def excess_means(self) -> torch.Tensor:
        """Mean over each completion's tokens of `log p - log sum_v p(v)^2`, [N], detached.

        Needs `squares_T`.
        """
        assert self.squares_T is not None
        sums = self._add_up(self.tokens_T.detach() - self.squares_T)
        return sums / to_device(np.array(self.lengths), sums.device)

    def detach(self) -> CompletionLogps:
        """The same values as leaves, which collect gradients for `backward`."""
        return self._replace(
            tokens_T=self.tokens_T.detach().requires_grad_(),
            routing=self.routing and self.routing.detach(),
        )

    def backward(self, detached: CompletionLogps) -> None:
        """Continue into the model with the gradients of `detached`, which has the same completions."""
        sides = [(self.tokens_T, detached.tokens_T)]
        if self.routing and detached.routing:
            sides.append((self.routing.probs_E, detached.routing.probs_E))
        torch.autograd.backward([one for one, _ in sides], [other.grad for _, other in sides])

    def _add_up(self, values_T: torch.Tensor) -> torch.Tensor:
        owners_T = to_device(np.repeat(np.arange(len(self.lengths)), self.lengths), values_T.device)
        values_T = values_T.to(sum_dtype(values_T.device))
        return values_T.new_zeros(len(self.lengths)).index_add(0, owners_T, values_T)


class PolicyModel(torch.nn.Module):
    """A causal LM that maps completions to the log-probs of their tokens, its head included.

    Training calls the model only through this module's forward, so anything that wraps a module can wrap the
    policy: DDP reduces its gradients. A wrapper has no other attribute of this class. A model that FSDP2 has
    cut is run through `sharded`.

    Args:
        model: the causal LM, set to the attention that was chosen for it.
        attention: how the model is run, from `choose_attention`.
        precision: fp32, bf16-mixed or bf16; bf16-mixed runs the model under autocast.
        with_squares: also return `squares_T`, at the cost of another product with the head.
        with_routing: also return the routing of a mixture of experts, which must return router logits.
        sharded: what runs the model, if its weights are cut into shards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: AttentionChoice,
        *,
        precision: str = "fp32",
        with_squares: bool = False,
        with_routing: bool = False,
        sharded: ShardedModel | None = None,
    ):
        super().__init__()
        self.model: PreTrainedModel = model
        self.attention, self.precision = attention, precision
        self.with_squares, self.with_routing, self.sharded = with_squares, with_routing, sharded
        self.train(model.training)

    def forward(
        self, parts: Sequence[Sequence[Completion]] = (), *, generate: Mapping[str, Any] | None = None
    ) -> Any:
        """Log-probs of the completions of each part, `[CompletionLogps, ...]`.

        A part is run at once, as one forest or as rows; it is a step or a piece of a step. With `generate`,
        returns the output of `model.generate(**generate)` instead, so that generation is wrapped, too.
        """
        if generate is None:
            return self._call(partial(self._run, parts))
        with torch.no_grad():
            return self._call(partial(self._generate, generate))

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name; of shards, this rank's rows."""
        if self.sharded is not None:
            return self.sharded.trained
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def _call(self, function: Callable[[], Any]) -> Any:
        return function() if self.sharded is None else self.sharded.run(function)

    def _run(self, parts: Sequence[Sequence[Completion]]) -> list[CompletionLogps]:
        with autocast(self.model.device, self.precision):
            return [
                completion_logps(
                    self.model,
                    part,
                    self.attention,
                    with_squares=self.with_squares,
                    with_routing=self.with_routing,
                )
                for part in parts
            ]

    def _generate(self, arguments: Mapping[str, Any]) -> Any:
        with autocast(self.model.device, self.precision, keeps_copies=True):
            return self.model.generate(**arguments)  # type: ignore[operator]  # mypy: Tensor | Module


def count_tokens(attention: AttentionChoice, completions: Sequence[Completion]) -> int:
    """Tokens that a part of these completions runs: of its forest, or of its rows with their padding."""
    if attention.name == "forest":
        return count_forest_tokens(completions)
    lengths = [len(completion) for completion in completions]
    return sum(lengths) if attention.max_rows == 1 else max(lengths) * len(lengths)


def completion_logps(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    *,
    with_squares: bool = False,
    with_routing: bool = False,
) -> CompletionLogps:
    """Log-probs of each completion's tokens: `log_softmax(logits.float(), -1)` at the tokens.

    If the model takes the forest, shared prefixes are run once, in one flat row without padding.
    """
    batches = run_at_once(completions, attention)
    return join_logps([_run(model, batch, attention, with_squares, with_routing) for batch in batches])


def run_at_once(completions: Sequence[Completion], attention: AttentionChoice) -> list[Sequence[Completion]]:
    """The completions in the batches in which the model may run them."""
    if attention.max_tokens is not None:
        return split_by_tokens(completions, attention.max_tokens)
    size = attention.max_rows or len(completions)
    return [completions[start : start + size] for start in range(0, len(completions), size)]


def _run(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    with_squares: bool,
    with_routing: bool,
) -> CompletionLogps:
    """Run the completions as one forest, as one batch of rows, or one of them by the model's own forward."""
    arguments = {"output_router_logits": True} if with_routing else {}
    if attention.is_whole:
        run = run_whole(model, completions, **arguments)
    else:
        one = decoder_pass(model, completions, attention, **arguments)
        run = one.read(decoder_of(model)(**one.arguments))
    logps = logps_of_run(model, run, completions, attention, with_squares=with_squares)
    if not with_routing:
        return logps
    num_chosen = model.config.get_text_config().num_experts_per_tok
    return logps._replace(routing=measure_routing(run.router_logits, run.uses.flatten(), num_chosen))


def decoder_pass(
    model: PreTrainedModel, completions: Sequence[Completion], attention: AttentionChoice, **arguments: Any
) -> DecoderPass:
    """The decoder's run of completions that are run at once; further arguments are the model's."""
    if attention.name == "forest":
        return _forest_pass(model, completions, attention.kernel, **arguments)
    return rows_pass(model, completions, **arguments)


def logps_of_run(
    model: PreTrainedModel,
    run: RunOutput,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    *,
    with_squares: bool = False,
) -> CompletionLogps:
    """The log-probs of the completions from a run of them: what the head makes of its hidden states."""
    vocab_size = model.config.get_text_config().vocab_size
    head: Head = _as_given if attention.is_whole else head_of(model)
    if attention.has_plain_head and torch.is_grad_enabled():
        tokens_T = head_token_logps(run.predictors_TD, model.get_output_embeddings(), run.targets_T)
    else:
        tokens_T = token_logps(run.predictors_TD, head, run.targets_T, vocab_size)
    squares_T = None
    if with_squares:
        squares_T = log_squared_probs(run.predictors_TD, head, vocab_size)
    if run.places_T is not None:
        tokens_T = tokens_T.index_select(0, run.places_T)
        squares_T = None if squares_T is None else squares_T.index_select(0, run.places_T)
    return CompletionLogps(tokens_T, [completion.num_tokens for completion in completions], squares_T)


def _as_given(logits_TV: torch.Tensor) -> torch.Tensor:
    """The head of a model whose own forward computed the logits."""
    return logits_TV


def _forest_pass(
    model: PreTrainedModel, completions: Sequence[Completion], kernel: str, **arguments: Any
) -> DecoderPass:
    forest, device = build_forest(completions), model.device
    targets = np.flatnonzero(forest.is_target_L())
    places = np.searchsorted(targets, np.concatenate(forest.targets))
    uses = to_device(forest.uses_L(), device)

    def read(outputs: Any) -> RunOutput:
        parents = to_device(forest.parents_L[targets], device)
        return RunOutput(
            getattr(outputs, "router_logits", None),
            uses=uses,
            predictors_TD=outputs[0][0].index_select(0, parents),
            targets_T=to_device(forest.tokens_L[targets], device),
            places_T=to_device(places, device),
        )

    return DecoderPass(forest_arguments(model, forest, kernel, **arguments), uses, read)


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


def default_micro_tokens(device: torch.device) -> int:
    """Tokens run at once with gradients: enough for matrix products at full speed, and no more, for their
    activations fill the memory.
    """
    return 1024 if planning_device_type(device) == "cpu" else 4096
