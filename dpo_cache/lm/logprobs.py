"""Hidden states -> log-probs of given tokens, without ever holding [tokens, vocab].

T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo_cache.errors import ModelError

ROWS_STEP = 64  # rows are filled up to a multiple of it: logits of ever new sizes would scatter the heap, which then grows

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden [T, D] -> logits [T, V]

# Logits at a time: on a CPU few enough that the allocator hands the same memory out again, on a GPU enough to fill it.
LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**25, "mps": 2**25}


def token_logps(hidden_TD: torch.Tensor, head: Head, targets_T: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Log-probability, in nats, of each target token: float32 [T].

    Equals `log_softmax(head(hidden_TD).float(), -1)` gathered at `targets_T`, but holds the logits of a
    few hundred tokens at most (LOGITS_PER_CHUNK), once forward and again in the backward pass, where each
    chunk is recomputed.
    """
    chunk = max(16, LOGITS_PER_CHUNK.get(hidden_TD.device.type, 2**23) // vocab_size)
    chunk -= chunk % ROWS_STEP if chunk > ROWS_STEP else 0
    parts = []
    for hidden, targets in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad:
            parts.append(checkpoint(_chunk_logps, hidden, head, targets, use_reentrant=False, preserve_rng_state=False))
        else:
            num_rows = len(targets)
            padding = -num_rows % ROWS_STEP if chunk >= ROWS_STEP else 0
            padded, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(targets, (0, padding))
            parts.append(_logps_in_place(head(padded), targets)[:num_rows])
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0, dtype=torch.float32)


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a causal LM that ends in hidden states."""
    return model._modules[_decoder_name(model)]  # type: ignore[return-value]


def head_of(model: PreTrainedModel) -> Head:
    """The rest of a causal LM: what its own `forward` does to hidden states, scaling, caps and biases included.

    A view of the model that shares its modules but whose decoder hands over the given hidden states.
    """
    decoder = _GivenHidden()
    view = copy.copy(model)
    view._modules = {**model._modules, _decoder_name(model): decoder}

    def head(hidden_TD: torch.Tensor) -> torch.Tensor:
        decoder.hidden = hidden_TD[None]
        try:
            return view(inputs_embeds=decoder.hidden, use_cache=False).logits[0]
        finally:
            decoder.hidden = None

    return head


def _decoder_name(model: PreTrainedModel) -> str:
    if model.base_model_prefix in model._modules:
        return model.base_model_prefix
    names = [name for name, module in model.named_children() if isinstance(module, PreTrainedModel)]
    if len(names) != 1:
        raise ModelError(f"{type(model).__name__} is not built as one decoder and a head; it cannot be used.\nGive a text-only causal LM.")
    return names[0]


class _GivenHidden(torch.nn.Module):
    hidden: torch.Tensor | None = None

    @property
    def decoder(self) -> _GivenHidden:  # some families call `self.model.decoder`
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return _HiddenOnly(last_hidden_state=self.hidden)


class _HiddenOnly(BaseModelOutputWithPast):
    """A decoder's output of which nothing but the hidden states is there; each family looks for other fields."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _chunk_logps(hidden_TD: torch.Tensor, head: Head, targets_T: torch.Tensor) -> torch.Tensor:
    return _TargetLogps.apply(head(hidden_TD), targets_T)


def _logps_in_place(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """What `_TargetLogps` computes, in the memory of the logits, which are used up."""
    shifted_TV = logits_TV.float()
    shifted_TV.sub_(shifted_TV.amax(-1, keepdim=True))
    picked_T = shifted_TV.gather(1, targets_T[:, None])[:, 0]
    return picked_T - shifted_TV.exp_().sum(-1).log()


class _TargetLogps(torch.autograd.Function):
    """`log_softmax(logits.float(), -1)` at the targets, nearer to the exact value than torch's own.

    log_softmax adds up the vocabulary in plain fp32 on a CPU, which leaves some 7e-6 nats a token, always of one sign:
    in a sum over hundreds of tokens that shows. Shifting by the maximum first keeps confident tokens exact.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        shifted_TV = logits_TV.float() - logits_TV.amax(-1, keepdim=True).float()
        picked_T = shifted_TV.gather(1, targets_T[:, None])[:, 0]
        totals_T = shifted_TV.exp_().sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(shifted_TV, totals_T, targets_T)
            ctx.dtype = logits_TV.dtype
        return picked_T - totals_T.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        exponentials_TV, totals_T, targets_T = ctx.saved_tensors
        grad_TV = exponentials_TV.mul_((-grads[0] / totals_T)[:, None])  # minus softmax; the buffer is used up
        grad_TV.scatter_add_(1, targets_T[:, None], grads[0][:, None])
        return grad_TV.to(ctx.dtype), None
