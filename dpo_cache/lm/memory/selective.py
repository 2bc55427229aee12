"""Selective recomputation: a layer keeps the outputs of chosen operators; the backward pass computes the
others again.

    kept = KeptOutputs(is_kept)
    output = checkpoint(layer, inputs, use_reentrant=False, context_fn=kept.contexts)
    kept.end_forward(output)

torch has the same as `create_selective_checkpoint_contexts`, but it keeps the output itself. If the model's
code then changes the output in place, the layer is computed again from other values: torch raises an error,
or, where the change goes through a tensor with a version counter of its own, as after `torch.matmul`, the
gradient is silently wrong. Here a kept output is copied before its memory changes for the first time; all
other outputs are kept without a copy.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

# operator, its positional arguments -> whether its output is kept; the same for the same shapes
IsKept = Callable[[Any, tuple[Any, ...]], bool]


@dataclass
class _Output:
    """A kept output of an operator; `spec` puts it together again."""

    leaves: list[Any]
    spec: TreeSpec


class KeptOutputs:
    """The outputs that one run of a layer keeps, by operator in the order of its calls."""

    def __init__(self, is_kept: IsKept):
        self.is_kept = is_kept
        self._outputs: dict[Any, deque[_Output]] = defaultdict(deque)
        # until the run ends: the outputs in each storage, and the place of their leaf
        self._by_storage: dict[int, list[tuple[_Output, int]]] = defaultdict(list)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The contexts of the run and of its repetition, for `checkpoint`."""
        return _Keep(self), _Reuse(self)

    def keep(self, operator: Any, output: Any) -> None:
        leaves, spec = tree_flatten(output)
        kept = _Output([leaf.detach() if torch.is_tensor(leaf) else leaf for leaf in leaves], spec)
        self._outputs[operator].append(kept)
        for place, leaf in enumerate(kept.leaves):
            if torch.is_tensor(leaf):
                self._by_storage[_storage(leaf)].append((kept, place))

    def reuse(self, operator: Any) -> Any:
        """The output of the operator's next call."""
        if not self._outputs[operator]:
            raise RuntimeError(
                f"a repeated layer calls {operator} more often than before: it is not deterministic"
            )
        output = self._outputs[operator].popleft()
        return tree_unflatten(output.leaves, output.spec)

    def before_change(self, tensor: torch.Tensor) -> None:
        """Copy the kept outputs in the tensor's memory."""
        for output, place in self._by_storage.pop(_storage(tensor), ()):
            output.leaves[place] = output.leaves[place].clone()

    def end_forward(self, result: Any) -> None:
        """The layer has returned `result`, which later layers may change in place."""
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                self.before_change(leaf)
        self._by_storage.clear()


class _WithKept(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, kept: KeptOutputs):
        super().__init__()
        self._kept = kept


class _Keep(_WithKept):
    """Keeps outputs while a layer runs."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _changed(operator, args, kwargs):
            self._kept.before_change(tensor)
        output = operator(*args, **kwargs)
        if self._kept.is_kept(operator, args):
            self._kept.keep(operator, output)
        return output


class _Reuse(_WithKept):
    """Returns the kept outputs while the layer runs again."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._kept.is_kept(operator, args):
            return self._kept.reuse(operator)
        return operator(*args, **(kwargs or {}))


def _changed(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that the operator writes to, by its schema."""
    schema = getattr(operator, "_schema", None)  # higher-order operators have none
    if schema is None or not schema.is_mutable:
        return []
    values = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in tree_leaves(values) if torch.is_tensor(leaf)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
