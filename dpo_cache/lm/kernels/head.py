"""Hidden states -> log-probs of given tokens, without logits [tokens, vocab] in memory.

T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dpo_cache.lm.device import autocast_dtype, planning_device_type
from dpo_cache.lm.kernels.onednn_linear import TORCH, Products, products_of
from dpo_cache.lm.model.parts import Head

# Rows are padded to a multiple of this: logits of ever new sizes would fragment the heap, which then grows.
ROWS_STEP = 64

# Logits at a time: on a CPU few enough that the allocator reuses the same memory, on a GPU enough to occupy
# it.
LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**25, "mps": 2**25}
# The same for a slice of the vocabulary: on a CPU few enough to stay in the cache.
LOGITS_PER_SLICE = {**LOGITS_PER_CHUNK, "cpu": 2**21}
# How many logits are kept at once for gradients of the head's weight; others are computed again.
LOGITS_KEPT = {"cpu": 2**25, "cuda": 0, "mps": 0}


def token_logps(
    hidden_TD: torch.Tensor, head: Head, targets_T: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Log-probability, in nats, of each target token: float32 [T].

    Equals `log_softmax(head(hidden_TD).float(), -1)` gathered at `targets_T`, but holds the logits of at
    most a few hundred tokens (LOGITS_PER_CHUNK). The backward pass recomputes each chunk.
    """
    chunk = _rows_at_once(hidden_TD.device, vocab_size)
    chunk -= chunk % ROWS_STEP if chunk > ROWS_STEP else 0
    parts = []
    for hidden, targets in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad:
            parts.append(
                checkpoint(_chunk_logps, hidden, head, targets, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            num_rows = len(targets)
            padding = -num_rows % ROWS_STEP if chunk >= ROWS_STEP else 0
            padded, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(targets, (0, padding))
            parts.append(_logps_in_place(head(padded), targets)[:num_rows])
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0, dtype=torch.float32)


def head_token_logps(
    hidden_TD: torch.Tensor, layer: torch.nn.Linear, targets_T: torch.Tensor
) -> torch.Tensor:
    """Log-probability, in nats, of each target token under a head that is only this layer: float32 [T].

    Equals `log_softmax(layer(hidden_TD).float(), -1)` gathered at `targets_T`. Runs through the vocabulary in
    slices of a few thousand entries, once forward and once backward, so that each slice of the weight's
    gradient is one product, written once.
    """
    hidden_TD = hidden_TD.to(autocast_dtype(hidden_TD.device) or hidden_TD.dtype)  # as the layer would
    products = products_of(layer) if hidden_TD.dtype == torch.float32 else TORCH
    return _HeadLogps.apply(hidden_TD, layer.weight, targets_T, products)


def _rows_at_once(device: torch.device, vocab_size: int) -> int:
    return max(16, LOGITS_PER_CHUNK.get(planning_device_type(device), 2**23) // vocab_size)


@torch.no_grad()
def log_squared_probs(hidden_TD: torch.Tensor, head: Head, vocab_size: int) -> torch.Tensor:
    """`log sum_v p(v)^2` of the next-token distribution at each hidden state: float32 [T], without gradients.

    Minus the collision entropy, in nats. Costs one product with the head; holds LOGITS_PER_CHUNK logits at
    most.
    """
    chunk = _rows_at_once(hidden_TD.device, vocab_size)
    return torch.cat([_log_squares(head(hidden)) for hidden in hidden_TD.detach().split(chunk)])


def _log_squares(logits_TV: torch.Tensor) -> torch.Tensor:
    exponentials_TV = (logits_TV.float() - logits_TV.amax(-1, keepdim=True).float()).exp_()
    return 2 * (torch.linalg.vector_norm(exponentials_TV, dim=-1).log() - exponentials_TV.sum(-1).log())


def _chunk_logps(hidden_TD: torch.Tensor, head: Head, targets_T: torch.Tensor) -> torch.Tensor:
    return _TargetLogps.apply(head(hidden_TD), targets_T)


def _logps_in_place(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """`_TargetLogps` without gradients, in the memory of the logits, which it overwrites."""
    shifted_TV = logits_TV.float()
    shifted_TV.sub_(shifted_TV.amax(-1, keepdim=True))
    picked_T = shifted_TV.gather(1, targets_T[:, None])[:, 0]
    return picked_T - shifted_TV.exp_().sum(-1).log()


class _TargetLogps(torch.autograd.Function):
    """`log_softmax(logits.float(), -1)` at the targets, nearer to the exact value than torch's function.

    On a CPU log_softmax sums over the vocabulary in plain fp32, with an error of some 7e-6 nats a token that
    always has the same sign and adds up over hundreds of tokens. Shifting by the maximum first keeps
    confident tokens exact.
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
        # minus softmax, in the buffer of the exponentials
        grad_TV = exponentials_TV.mul_((-grads[0] / totals_T)[:, None])
        grad_TV.scatter_add_(1, targets_T[:, None], grads[0][:, None])
        return grad_TV.to(ctx.dtype), None


class _HeadLogps(torch.autograd.Function):
    """See `head_token_logps`. S entries of a slice of the vocabulary.

    Backward computes the logits again, for the gradient of the head's weight, except those of the first
    slices, which `_KeptSlices` keeps. Under a frozen head, forward already computes the gradient of a hidden
    state up to the factor that the loss gives:
    `(1 - p_target) weight_target - sum of p_v weight_v over the others`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        products: Products,
    ) -> torch.Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        others = _Others(hidden_TD, products) if for_hidden and not for_weight else None
        picked_T = torch.zeros(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
        peaks, totals = [], []
        kept = _KeptSlices(LOGITS_KEPT[planning_device_type(hidden_TD.device)] if for_weight else 0)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for _, weight_SD, inside_T, places_T in _slices(weight_VD, targets_T):
                weight_SD = weight_SD.to(hidden_TD.dtype)
                logits_TS = products.output(hidden_TD, weight_SD).float()
                picked_T = torch.where(inside_T, logits_TS.gather(1, places_T[:, None])[:, 0], picked_T)
                peaks.append(logits_TS.amax(-1))
                exponentials_TS = logits_TS.sub_(peaks[-1][:, None]).exp_()
                totals.append(exponentials_TS.sum(-1))
                kept.add(exponentials_TS)
                if others is not None:
                    others.add(peaks[-1], exponentials_TS, weight_SD, inside_T, places_T)
        peaks_NT, totals_NT = torch.stack(peaks), torch.stack(totals)
        peak_T = peaks_NT.amax(0)
        total_T = (totals_NT * (peaks_NT - peak_T).exp()).sum(0)
        if others is None:
            ctx.products = products
            ctx.kept = kept
            ctx.save_for_backward(hidden_TD, weight_VD, targets_T, peak_T, total_T, peaks_NT)
        else:
            unscaled_TD = others.unscaled_gradient(weight_VD.index_select(0, targets_T), total_T)
            ctx.save_for_backward(unscaled_TD.to(hidden_TD.dtype))
        return picked_T - peak_T - total_T.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            (unscaled_TD,) = ctx.saved_tensors
            return (unscaled_TD * grads[0][:, None]).to(unscaled_TD.dtype), None, None, None
        hidden_TD, weight_VD, targets_T, peak_T, total_T, peaks_NT = ctx.saved_tensors
        # a sum over slices
        grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD)
        scale_T = -grads[0] / total_T
        slices = _slices(weight_VD, targets_T)
        for slice_peak_T, (entries, weight_SD, inside_T, places_T) in zip(peaks_NT, slices, strict=True):
            weight_SD = weight_SD.to(hidden_TD.dtype)
            grad_TS = ctx.kept.pop()
            if grad_TS is None:
                grad_TS = ctx.products.output(hidden_TD, weight_SD).float()
                grad_TS.sub_(slice_peak_T[:, None]).exp_()
            grad_TS.mul_((scale_T * (slice_peak_T - peak_T).exp())[:, None])  # minus softmax
            grad_TS.scatter_add_(1, places_T[:, None], torch.where(inside_T, grads[0], 0)[:, None])
            grad_TS = grad_TS.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD += ctx.products.for_inputs(grad_TS, weight_SD)
            grad_weight_VD[entries] = ctx.products.for_weight(grad_TS, hidden_TD, weight_SD)
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD.to(hidden_TD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None


class _KeptSlices:
    """The exponentials of a head's first slices, relative to each slice's largest logit, for its backward
    pass.

    `most` limits the numbers that all objects of this class keep together: a step may have many forests whose
    backward passes have not started.
    """

    num_alive: ClassVar[int] = 0

    def __init__(self, most: int):
        self._most, self._num_own = most, 0
        self._slices: deque[torch.Tensor] = deque()

    def add(self, exponentials_TS: torch.Tensor) -> None:
        """Keep the next slice, if it and those before it may be kept."""
        size = exponentials_TS.numel()
        if _KeptSlices.num_alive + size > self._most:
            self._most = 0  # nor any later one
            return
        self._slices.append(exponentials_TS)
        self._num_own += size
        _KeptSlices.num_alive += size

    def pop(self) -> torch.Tensor | None:
        """The next slice, which the caller may overwrite; None if it must be computed again."""
        return self._slices.popleft() if self._slices else None

    def __del__(self) -> None:
        _KeptSlices.num_alive -= self._num_own


class _Others:
    """Sums over the vocabulary except the target: of exponentials, relative to the largest logit so far, and
    of weights times these exponentials.
    """

    def __init__(self, hidden_TD: torch.Tensor, products: Products):
        self._products = products
        self._sums_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        self._total_T = torch.zeros_like(self._sums_TD[:, 0])
        self._peak_T = torch.full_like(self._total_T, -torch.inf)

    def add(
        self,
        peak_T: torch.Tensor,
        exponentials_TS: torch.Tensor,
        weight_SD: torch.Tensor,
        inside_T: torch.Tensor,
        places_T: torch.Tensor,
    ) -> None:
        """Add a slice, whose exponentials are relative to its largest logit; those of targets become 0."""
        own_T = exponentials_TS.gather(1, places_T[:, None])[:, 0]
        exponentials_TS.scatter_(1, places_T[:, None], torch.where(inside_T, 0, own_T)[:, None])
        sums_TD = self._products.for_inputs(exponentials_TS.to(weight_SD.dtype), weight_SD)
        before_T, self._peak_T = self._peak_T, torch.maximum(self._peak_T, peak_T)
        old_T, new_T = (before_T - self._peak_T).exp(), (peak_T - self._peak_T).exp()
        self._total_T = self._total_T * old_T + exponentials_TS.sum(-1) * new_T
        self._sums_TD.mul_(old_T[:, None]).addcmul_(sums_TD.float(), new_T[:, None])

    def unscaled_gradient(self, target_weights_TD: torch.Tensor, total_T: torch.Tensor) -> torch.Tensor:
        """Gradient [T, D] of the targets' log-probs by the hidden states, without the loss's factor;
        `total_T` is relative to the largest logit of all.
        """
        return (target_weights_TD.float() * self._total_T[:, None]).sub_(self._sums_TD).div_(total_T[:, None])


def _slices(
    weight_VD: torch.Tensor, targets_T: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Slices of the vocabulary: the entries, their weights, which targets are among them, and at which place;
    any place for the other targets, so that no shape depends on values.
    """
    most_logits = LOGITS_PER_SLICE[planning_device_type(weight_VD.device)]
    size = max(1024, most_logits // max(1, len(targets_T)) // 512 * 512)
    for start in range(0, len(weight_VD), size):
        stop = min(start + size, len(weight_VD))
        inside_T, places_T = (targets_T >= start) & (targets_T < stop), targets_T - start
        yield slice(start, stop), weight_VD[start:stop], inside_T, places_T.clamp(0, stop - start - 1)
