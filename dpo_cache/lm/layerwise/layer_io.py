"""Inputs and outputs of layers, and code in place of their forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import Cache

STATE = "hidden_states"  # the name of a layer's first parameter, where it is given by name

Slot = int | str  # an argument: its position after the state, or its name


class NotLayerMajorError(Exception):
    """Why a decoder cannot be taken apart, in words."""


@contextmanager
def replaced_forwards(layers: Iterable[torch.nn.Module], function: Any) -> Iterator[None]:
    """Let each layer's forward be `function(layer, forward, *args, **kwargs)`."""
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in before:
        forward = layer.forward

        def replaced(*args: Any, _layer: Any = layer, _forward: Any = forward, **kwargs: Any) -> Any:
            return function(_layer, _forward, *args, **kwargs)

        layer.forward = replaced  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def split_given(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The state that a layer is given, and the other arguments."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], args[1:], kwargs
    if not args and isinstance(kwargs.get(STATE), torch.Tensor):
        return kwargs[STATE], (), {name: value for name, value in kwargs.items() if name != STATE}
    raise NotLayerMajorError(f"{type(layer).__name__} is not given its hidden states first")


@dataclass
class Returned:
    """The outputs of the layers so far: the entries of the last one, and the version of its state then."""

    entries: tuple[Any, ...] = ()
    version: int | None = None
    earlier: list[weakref.ref[torch.Tensor]] = field(default_factory=list)  # tensors of those before

    def add(self, entries: tuple[Any, ...]) -> None:
        self.earlier += [weakref.ref(one) for one in self.entries if isinstance(one, torch.Tensor)]
        self.entries, self.version = entries, version_of(entries[0])

    def check_given(self, layer: torch.nn.Module, state: torch.Tensor) -> None:
        """Raise `NotLayerMajorError` unless this is the state that the last layer returned."""
        if self.entries and not (_is_same(state, self.entries[0]) and version_of(state) == self.version):
            raise NotLayerMajorError(f"its code changes the hidden states before a {type(layer).__name__}")

    def taken(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Slot, int]:
        """The arguments that the last layer returned, with their places in its tuple."""
        given: list[tuple[Slot, Any]] = [*enumerate(args), *kwargs.items()]
        found = {
            slot: place
            for slot, value in given
            for place, entry in enumerate(self.entries)
            if value is entry and isinstance(value, torch.Tensor)
        }
        others = [value for slot, value in given if slot not in found]
        known = {id(one) for ref in self.earlier if (one := ref()) is not None}
        known |= {id(one) for one in tree_leaves(self.entries)}
        if any(isinstance(one, torch.Tensor) and id(one) in known for one in tree_leaves(others)):
            raise NotLayerMajorError(f"a {type(layer).__name__} is given the output of an earlier layer")
        return found


def contents_of(layer: torch.nn.Module, given: Any) -> list[tuple[int, int | None]]:
    """Equal before and after a layer that leaves all that it is given as it was; except entries of dicts,
    through which layers hand on keys and values.
    """
    found = []
    for one in tree_leaves(given, is_leaf=lambda one: isinstance(one, Cache | MutableMapping)):
        if isinstance(one, Cache):
            raise NotLayerMajorError(f"a {type(layer).__name__} keeps keys and values or a state in a cache")
        found.append((id(one), version_of(one) if isinstance(one, torch.Tensor) else None))
    return found


def form_of(layer: torch.nn.Module, output: Any) -> tuple[type, int] | None:
    """The kind and length of a layer's tuple or list, None for a plain tensor."""
    if isinstance(output, torch.Tensor):
        return None
    if type(output) not in (tuple, list) or not isinstance(output[0], torch.Tensor):
        raise NotLayerMajorError(f"{type(layer).__name__} does not return its hidden states first")
    return type(output), len(output)


def entries_of(output: Any) -> tuple[Any, ...]:
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)


def version_of(tensor: torch.Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode have none."""
    return None if tensor.is_inference() else tensor._version


def _is_same(given: torch.Tensor, returned: torch.Tensor) -> bool:
    """Return whether a tensor is another one, or a slice of all of it, as Gemma 4 takes, and not detached."""
    return given is returned or _memory(given) == _memory(returned)


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    memory = tensor.untyped_storage()._cdata
    layout = tensor.shape, tensor.stride(), tensor.storage_offset()
    return memory, tensor.dtype, tensor.requires_grad, *layout
