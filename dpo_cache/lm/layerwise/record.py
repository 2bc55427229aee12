"""A decoder taken apart at its layers, by its own code: what each layer is given, and what follows the last.

    layers = find_layers(model, **arguments)        runs the decoder once, and watches its layers
    found = record(layers, **arguments)             bottom: the decoder with layers that do nothing
    state = found.calls[0].run(found.state)         one layer
    outputs = finish(layers, state, **arguments)    top: the decoder with layers that hand in `state`

Equals `decoder(**arguments)`, as long as each layer is given the very tensor that the layer before returned.
`find_layers` refuses a decoder that computes anything between its layers. The state is what passes from layer
to layer: hidden states [B, L, D] in most families. A layer may hand on more than the state to the next one,
such as the indices of the keys that it chose; all calls of a pass share a dict for that, `LayerCall.carried`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cache.errors import first_line
from dpo_cache.lm.layerwise.layer_io import (
    NotLayerMajorError,
    Returned,
    Slot,
    contents_of,
    entries_of,
    form_of,
    replaced_forwards,
    split_given,
    version_of,
)
from dpo_cache.lm.model.parts import decoder_of


@dataclass(frozen=True)
class Layers:
    """The layers of a decoder in the order of their calls; one that is called twice is listed twice."""

    decoder: torch.nn.Module
    order: list[torch.nn.Module]
    # the output of each call: tuple or list, and its length; None: a tensor
    forms: list[tuple[type, int] | None]
    # for each call: arguments other than the state that the previous call returned, by place in its tuple
    takes: list[dict[Slot, int]]

    def __len__(self) -> int:
        return len(self.order)

    def hands_on(self, place: int) -> frozenset[int]:
        """The places in a call's tuple that the next call takes."""
        return frozenset(self.takes[place + 1].values()) if place + 1 < len(self) else frozenset()


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer by the decoder's code, with everything that it is given but the state."""

    layer: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    takes: Mapping[Slot, int] = field(default_factory=dict)
    hands_on: frozenset[int] = frozenset()
    # the outputs of the layer that ran last, by place; the same dict for all calls of a pass
    carried: MutableMapping[int, Any] = field(default_factory=dict)

    def run(self, state: torch.Tensor) -> torch.Tensor:
        """The state after the layer."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for slot, place in self.takes.items():
            if isinstance(slot, int):
                args[slot] = self.carried[place]
            else:
                kwargs[slot] = self.carried[place]
        version = version_of(state)
        output = self.layer(state, *args, **kwargs)
        if version_of(state) != version:
            raise NotLayerMajorError(f"a {type(self.layer).__name__} changes its input in place")
        entries = entries_of(output)
        self.carried.clear()
        self.carried.update({place: entries[place] for place in self.hands_on})
        return entries[0]  # type: ignore[no-any-return]

    def tensors(self) -> list[torch.Tensor]:
        """Those among the arguments besides the state, in dicts as well."""
        return [one for one in tree_leaves((self.args, self.kwargs)) if isinstance(one, torch.Tensor)]


@dataclass(frozen=True)
class Recording:
    """The calls of all layers, the state that the first one is given, and where its gradient goes."""

    state: torch.Tensor  # without the bottom's graph
    calls: list[LayerCall]
    bottom: GradientEdge | None  # None where the state needs no gradient


def find_layers(model: PreTrainedModel, **arguments: Any) -> Layers:
    """The layers of the model's decoder, found in one plain run.

    Raises `NotLayerMajorError` where the state changes between two layers, where a layer's output is given to
    another one than the next, and where layers change what they are given or keep a cache.
    """
    return watch_layers(decoder_of(model), decoder_of(model), arguments)[0]


def watch_layers(
    module: torch.nn.Module, decoder: torch.nn.Module, arguments: dict[str, Any]
) -> tuple[Layers, Any]:
    """The same, and the output of the run, which is that of a module around the decoder."""
    found = Layers(module, [], [], [])
    returned = Returned()

    def watch(layer: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, others, named = split_given(layer, args, kwargs)
        returned.check_given(layer, state)
        found.takes.append(returned.taken(layer, others, named))
        before = contents_of(layer, (state, others, named))
        output = forward(*args, **kwargs)
        if before != contents_of(layer, (state, others, named)):
            raise NotLayerMajorError(f"a {type(layer).__name__} changes its arguments")
        found.order.append(layer)
        found.forms.append(form_of(layer, output))
        returned.add(entries_of(output))
        return output

    candidates = outermost_layers(decoder)
    if not candidates:
        raise NotLayerMajorError(f"{type(decoder).__name__} has no layers that can be recognised")
    with replaced_forwards(candidates, watch):
        outputs = module(**arguments)
    if not found.order:
        raise NotLayerMajorError(f"{type(decoder).__name__} calls none of its layers")
    _check_empty(found, returned.entries[0], arguments)
    return found, outputs


def record(layers: Layers, **arguments: Any) -> Recording:
    """The arguments that the decoder passes to each layer; no layer runs. Raises `NotLayerMajorError`."""
    recording, _ = _run_empty(layers, None, arguments)
    return recording


def finish(layers: Layers, state: torch.Tensor, **arguments: Any) -> Any:
    """The decoder's output, hidden states first, where its last layer returns `state`; no layer runs."""
    _, outputs = _run_empty(layers, state, arguments)
    return outputs


def _run_empty(layers: Layers, last: torch.Tensor | None, arguments: Any) -> tuple[Recording, Any]:
    calls: list[LayerCall] = []
    states: list[torch.Tensor] = []
    returned = Returned()
    carried: dict[int, Any] = {}

    def hand_through(layer: torch.nn.Module, _: Any, *args: Any, **kwargs: Any) -> Any:
        place = len(calls)
        if place >= len(layers) or layer is not layers.order[place]:
            raise NotLayerMajorError(f"{type(layer).__name__} is called in another order than before")
        given, args, kwargs = split_given(layer, args, kwargs)
        takes, hands_on = layers.takes[place], layers.hands_on(place)
        returned.check_given(layer, given)
        if returned.taken(layer, args, kwargs) != takes:
            raise NotLayerMajorError(f"a {type(layer).__name__} is given other outputs than before")
        states[:] = states or [given]
        calls.append(LayerCall(layer, args, kwargs, takes, hands_on, carried))
        # a new tensor each time, so that the next layer's is known by its identity
        is_last = place == len(layers) - 1
        state = last if is_last and last is not None else given.view_as(given)
        kind, size = layers.forms[place] or (None, 1)
        others = (given.new_empty(0) if one in hands_on else None for one in range(1, size))
        returned.add((state, *others))
        return state if kind is None else kind(returned.entries)

    with replaced_forwards({*layers.order}, hand_through):
        outputs = layers.decoder(**arguments)
    if len(calls) != len(layers):
        raise NotLayerMajorError(f"{len(calls)} layers were called, {len(layers)} before")
    (first,) = states
    return Recording(
        first.detach(), calls, get_gradient_edge(first) if first.requires_grad else None
    ), outputs


def _check_empty(layers: Layers, state: torch.Tensor, arguments: Any) -> None:
    try:
        finish(layers, state, **arguments)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        raise NotLayerMajorError(
            f"its code reads more of its layers than their state ({first_line(error)})"
        ) from error


def outermost_layers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that are not inside another one; where the code marks none, the longest list of modules of
    one class.
    """
    marked = _marked(decoder)
    lists = [
        [*module]
        for module in decoder.modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(one) for one in module}) == 1
    ]
    return marked or max(lists, key=len, default=[])


def _marked(module: torch.nn.Module) -> list[torch.nn.Module]:
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [layer for child in module.children() for layer in _marked(child)]
