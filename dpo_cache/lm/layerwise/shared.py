"""Values other than the state that layers share: arguments with gradients, entries of shared dicts.

Gemma 3n's layers are given inputs of their own, which come from the embedding, and write their keys and
values into a dict from which later layers read. Other layers return more than the state, which the next one
takes. Run again for its gradient, a layer gets leaves in place of all these tensors. The gradient of each
leaf is added up over the layers, and carried to where the tensor was made: to the layer that wrote it, or to
the bottom.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dpo_cache.lm.layerwise.record import LayerCall

Roots = list[tuple[torch.Tensor | GradientEdge, torch.Tensor]]  # tensors, and their gradients
Content = list[dict[Any, Any]]  # entries of each shared dict of a call


@dataclass
class SharedTensors:
    """Those of one pass: their gradients so far, and what the dicts held before and after each layer."""

    _grads: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # by the tensor's id
    _contents: list[tuple[Content, Content]] = field(default_factory=list)  # one for each layer
    _made: set[int] = field(default_factory=set)  # ids of the tensors that layers wrote into dicts

    def run(self, call: LayerCall, state: torch.Tensor) -> torch.Tensor:
        """Run a layer of the forward pass."""
        before = _content(call)
        state = call.run(state)
        after = _content(call)
        for filled, written in zip(before, after, strict=True):
            self._made |= {id(one) for one in tree_leaves(_new_entries(filled, written))}
        self._contents.append((before, after))
        return state

    def run_again(self, call: LayerCall, state: torch.Tensor) -> tuple[torch.Tensor, Roots, Leaves]:
        """Run the last layer that has not been run again, with leaves in place of what it shares.

        Returns the state after it; what it wrote for later layers, with the gradients from there; and the
        leaves, for `collect` once they have their gradients.
        """
        leaves = Leaves()
        before, after = self._contents.pop()
        call = _with_leaves(call, leaves, before, self._made)
        state = call.run(state)
        roots: Roots = []
        for mapping, filled, written in zip(_mappings(call), before, after, strict=True):
            for key, value in _new_entries(filled, written).items():
                roots += self._written(value, mapping[key])
        return state, roots, leaves

    def collect(self, leaves: Leaves) -> None:
        """Add the gradients of a layer's leaves to those of the tensors that they replaced."""
        for tensor, leaf in leaves.by_id.values():
            if leaf.grad is not None:
                _, grad = self._grads.get(id(tensor), (tensor, None))
                self._grads[id(tensor)] = tensor, leaf.grad if grad is None else grad + leaf.grad

    def roots(self) -> Roots:
        """The tensors that are left, which the bottom made."""
        return [*self._grads.values()]

    def _written(self, original: Any, made: Any) -> Roots:
        pairs = zip(tree_leaves(original), tree_leaves(made), strict=True)
        return [
            (new, self._grads.pop(id(old))[1])
            for old, new in pairs
            if isinstance(old, torch.Tensor) and id(old) in self._grads
        ]


class Leaves:
    """Leaves in place of tensors."""

    def __init__(self) -> None:
        self.by_id: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's leaf, which needs a gradient."""
        return self.by_id.setdefault(id(tensor), (tensor, tensor.detach().requires_grad_()))[1]


def _with_leaves(call: LayerCall, leaves: Leaves, content: Content, made: set[int]) -> LayerCall:
    """The call with leaves in place of tensors with gradients, and with new dicts of that content.

    Of tensors in dicts, those have gradients that layers wrote, `made`, without a graph.
    """

    def replaced(one: Any) -> Any:
        is_leaf = isinstance(one, torch.Tensor) and (
            one.requires_grad or (id(one) in made and one.is_floating_point())
        )
        return leaves.of(one) if is_leaf else one

    new: dict[int, MutableMapping[Any, Any]] = {}
    for mapping, entries in zip(_mappings(call), content, strict=True):
        new[id(mapping)] = copy.copy(mapping)
        new[id(mapping)].clear()
        new[id(mapping)].update({key: tree_map(replaced, value) for key, value in entries.items()})
    values, spec = tree_flatten((call.args, call.kwargs), is_leaf=lambda one: id(one) in new)
    changed = [new[id(value)] if id(value) in new else replaced(value) for value in values]
    args, kwargs = tree_unflatten(changed, spec)
    return replace(call, args=args, kwargs=kwargs, carried=new[id(call.carried)])


def _new_entries(filled: dict[Any, Any], written: dict[Any, Any]) -> dict[Any, Any]:
    """The entries that a layer wrote into a dict."""
    return {key: value for key, value in written.items() if key not in filled or value is not filled[key]}


def _content(call: LayerCall) -> Content:
    return [dict(mapping) for mapping in _mappings(call)]


def _mappings(call: LayerCall) -> list[MutableMapping[Any, Any]]:
    """The dicts that a call shares with others: each once."""
    found = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, MutableMapping)]
    return [*{id(one): one for one in (*found, call.carried)}.values()]
