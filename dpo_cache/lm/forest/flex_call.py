"""FlexAttention as an operator of this package.

    output = FlexCall(block_mask, scaling, softcap)(query, key, value, sinks)

torch compiles FlexAttention, and does not compile under a dispatch mode, such as the one of selective
recomputation: there it would compute all scores. An operator is compiled wherever it runs, its output can be
kept, and tensors without values pass through it. Its backward pass computes the output again, for its
log-sums: a third more of the attention's time, and nothing is kept but its inputs.

H query heads, K key heads, N queries, P keys, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_cache.lm.forest.attention import Rules, attend_by_formula

try:
    from torch.nn.attention.flex_attention import AuxRequest

    WITH_LSE: dict[str, Any] = {"return_aux": AuxRequest(lse=True)}
except ImportError:  # before torch 2.9
    WITH_LSE = {"return_lse": True}

_numbers = count()
_calls: WeakValueDictionary[int, FlexCall] = WeakValueDictionary()


class FlexCall:
    """FlexAttention under a mask and the rules of a layer, without its sinks."""

    def __init__(self, mask: BlockMask, scaling: float, softcap: float | None):
        self.mask, self.scaling, self.softcap = mask, scaling, softcap
        # text is a constant to the compiler, which makes a symbol of a number, and fails on it
        self._cap = None if softcap is None else repr(softcap)
        self._number = next(_numbers)  # an operator's arguments are tensors and numbers
        _calls[self._number] = self

    def __call__(
        self,
        query_BHNE: torch.Tensor,
        key_BKPE: torch.Tensor,
        value_BKPE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention output [B, H, N, E]."""
        return _attention(query_BHNE, key_BKPE, value_BKPE, sinks_H, self._number)

    def compute(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks_H: torch.Tensor | None
    ) -> torch.Tensor:
        """The output: on CUDA by the compiled kernel, elsewhere by its formula, for tests."""
        if query.device.type != "cuda":
            return self._by_formula(query, key, value, sinks_H)
        return _compiled()(query, key, value, sinks_H, self.mask, self.scaling, self._cap)

    def _by_formula(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks_H: torch.Tensor | None
    ) -> torch.Tensor:
        zero = torch.tensor(0)
        queries, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        is_visible = self.mask.mask_mod(zero, zero, queries, keys)
        mask_NP = torch.zeros(is_visible.shape, dtype=torch.float32).masked_fill(~is_visible, -torch.inf)
        rules = Rules(self.scaling, softcap=self.softcap, sinks_H=sinks_H)
        # the kernel, too, has scores and weights in float32
        output = attend_by_formula(query.float(), key.float(), value.float(), rules, mask_NP)
        return output.to(query.dtype)


@torch.library.custom_op("dpo_cache::flex_attention", mutates_args=())
def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, number: int
) -> torch.Tensor:
    with torch.no_grad():
        query, key, value = query.detach(), key.detach(), value.detach()
        return _calls[number].compute(query, key, value, sinks).contiguous()


@_attention.register_fake
def _shape(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, _sinks: torch.Tensor | None, _number: int
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    *tensors, number = inputs
    ctx.save_for_backward(*tensors)
    ctx.call = _calls[number]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*attention_gradients(ctx.call, grad, ctx.saved_tensors, ctx.needs_input_grad), None)


def attention_gradients(
    call: FlexCall, grad: torch.Tensor, tensors: Sequence[torch.Tensor | None], needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of queries, keys, values and sinks, of those that are needed."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(needs)
        for tensor, needs in zip(tensors, needed, strict=False)
    ]
    with torch.enable_grad():
        query, key, value, sinks = leaves
        assert query is not None and key is not None and value is not None
        output = call.compute(query, key, value, sinks)
    sources = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(output, sources, grad))
    return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


_attention.register_autograd(_backward, setup_context=_setup)


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex, dynamic=True)


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks_H: torch.Tensor | None,
    mask: BlockMask,
    scaling: float,
    cap: str | None,
) -> torch.Tensor:
    """Attention output [B, H, N, E]; `cap` is the soft cap as text.

    A sink is a key without a value, which takes its share of the weights.
    """
    options: dict[str, Any] = {
        "score_mod": None if cap is None else _softcap(cap),
        "block_mask": mask,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if sinks_H is None:
        return flex_attention(query, key, value, **options)
    output, sums = flex_attention(query, key, value, **options, **WITH_LSE)
    lse_BHN = getattr(sums, "lse", sums)
    shares = torch.sigmoid(lse_BHN - sinks_H.float()[:, None])
    return (output * shares[..., None]).to(output.dtype)


def _softcap(text: str) -> Callable[..., torch.Tensor]:
    cap = float(text)

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return capped
