"""A decoder taken apart at its layers, by its own code: what each layer is given, and what follows the last.

    layers = find_layers(model, **arguments)        runs the decoder once, and watches its layers
    found = record(layers, **arguments)             bottom: the decoder with layers that do nothing
    state = found.calls[0].run(found.state)         one layer
    outputs = finish(layers, state, **arguments)    top: the decoder with layers that hand in `state`

Equals `decoder(**arguments)`, as long as each layer is given the very tensor that the layer before returned.
`find_layers` refuses a decoder that computes anything between its layers. The state is what passes from layer
to layer: hidden states [B, L, D] in most families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cache.lm.model.parts import decoder_of

STATE = "hidden_states"  # the name of a layer's first parameter, where it is given by name


class NotLayerMajorError(Exception):
    """Why a decoder cannot be taken apart, in words."""


@dataclass(frozen=True)
class Layers:
    """The layers of a decoder in the order of their calls; one that is called twice is listed twice."""

    decoder: torch.nn.Module
    order: list[torch.nn.Module]
    num_outputs: list[int | None]  # of each call: the length of the tuple that it returns; None: a tensor

    def __len__(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer by the decoder's code, with everything that it is given but the state."""

    layer: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, state: torch.Tensor) -> torch.Tensor:
        """The state after the layer."""
        version = state._version
        output = self.layer(state, *self.args, **self.kwargs)
        if state._version != version:
            raise NotLayerMajorError(f"a {type(self.layer).__name__} changes its input in place")
        return _state_of(output)


@dataclass(frozen=True)
class Recording:
    """The calls of all layers, the state that the first one is given, and where its gradient goes."""

    state: torch.Tensor  # without the bottom's graph
    calls: list[LayerCall]
    bottom: GradientEdge | None  # None where the state needs no gradient


def find_layers(model: PreTrainedModel, **arguments: Any) -> Layers:
    """The layers of the model's decoder, found in one plain run.

    Raises `NotLayerMajorError` where the state changes between two layers, or a layer returns more than the
    state.
    """
    decoder = decoder_of(model)
    order: list[torch.nn.Module] = []
    forms: list[int | None] = []
    returned: list[tuple[torch.Tensor, int]] = []  # the last state, and its version

    def watch(layer: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _check_given(layer, _given(layer, args, kwargs)[0], returned)
        output = forward(*args, **kwargs)
        forms.append(_form_of(layer, output))
        order.append(layer)
        state = _state_of(output)
        returned[:] = [(state, state._version)]
        return output

    candidates = _outermost(decoder)
    if not candidates:
        raise NotLayerMajorError(f"{type(decoder).__name__} has no layers that are known as such")
    with _replaced(candidates, watch):
        decoder(**arguments)
    if not order:
        raise NotLayerMajorError(f"{type(decoder).__name__} calls none of its layers")
    return Layers(decoder, order, forms)


def record(layers: Layers, **arguments: Any) -> Recording:
    """What each layer is given by the decoder's code; no layer runs. Raises `NotLayerMajorError`."""
    recording, _ = _run_empty(layers, None, arguments)
    return recording


def finish(layers: Layers, state: torch.Tensor, **arguments: Any) -> Any:
    """The decoder's output, hidden states first, where its last layer returns `state`; no layer runs."""
    _, outputs = _run_empty(layers, state, arguments)
    return outputs


def _run_empty(layers: Layers, last: torch.Tensor | None, arguments: Any) -> tuple[Recording, Any]:
    calls: list[LayerCall] = []
    states: list[torch.Tensor] = []
    returned: list[tuple[torch.Tensor, int]] = []

    def hand_through(layer: torch.nn.Module, _: Any, *args: Any, **kwargs: Any) -> Any:
        place = len(calls)
        if place >= len(layers) or layer is not layers.order[place]:
            raise NotLayerMajorError(f"{type(layer).__name__} is called in another order than before")
        given, args, kwargs = _given(layer, args, kwargs)
        _check_given(layer, given, returned)
        states[:] = states or [given]
        calls.append(LayerCall(layer, args, kwargs))
        # a new tensor each time, so that the next layer's is known by its identity
        is_last = place == len(layers) - 1
        state = last if is_last and last is not None else given.view_as(given)
        returned[:] = [(state, state._version)]
        size = layers.num_outputs[place]
        return state if size is None else (state, *[None] * (size - 1))

    with _replaced({*layers.order}, hand_through):
        outputs = layers.decoder(**arguments)
    if len(calls) != len(layers):
        raise NotLayerMajorError(f"{len(calls)} layers were called, {len(layers)} before")
    (first,) = states
    return Recording(
        first.detach(), calls, get_gradient_edge(first) if first.requires_grad else None
    ), outputs


def _outermost(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that are not inside another one."""
    if isinstance(decoder, GradientCheckpointingLayer):
        return [decoder]
    return [layer for child in decoder.children() for layer in _outermost(child)]


@contextmanager
def _replaced(layers: Sequence[torch.nn.Module] | set[torch.nn.Module], function: Any) -> Iterator[None]:
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


def _given(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The state that a layer is given, and the other arguments."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], args[1:], kwargs
    if not args and isinstance(kwargs.get(STATE), torch.Tensor):
        return kwargs[STATE], (), {name: value for name, value in kwargs.items() if name != STATE}
    raise NotLayerMajorError(f"{type(layer).__name__} is not given its hidden states first")


def _check_given(
    layer: torch.nn.Module, given: torch.Tensor, returned: list[tuple[torch.Tensor, int]]
) -> None:
    if returned and not (_is_same(given, returned[0][0]) and given._version == returned[0][1]):
        raise NotLayerMajorError(f"its code changes the hidden states before a {type(layer).__name__}")


def _is_same(given: torch.Tensor, returned: torch.Tensor) -> bool:
    """Whether a tensor is another one, or a slice of all of it, as Gemma 4 takes."""
    if given is returned:
        return True
    return (given.shape, given.stride(), given.storage_offset(), given.untyped_storage()._cdata) == (
        returned.shape,
        returned.stride(),
        returned.storage_offset(),
        returned.untyped_storage()._cdata,
    )


def _form_of(layer: torch.nn.Module, output: Any) -> int | None:
    """The length of a layer's tuple, None for a plain tensor."""
    if isinstance(output, torch.Tensor):
        return None
    is_state_only = (
        type(output) is tuple
        and isinstance(output[0], torch.Tensor)
        and all(one is None for one in output[1:])
    )
    if not is_state_only:
        raise NotLayerMajorError(f"{type(layer).__name__} returns more than its hidden states")
    return len(output)


def _state_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[no-any-return]
