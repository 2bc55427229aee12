"""Several passes through a decoder, layer by layer, and back.

    passes = LayerPasses(layers, weights, states)
    passes.forward([arguments, ...])          every pass through layer 0, then every one through layer 1, ...
    outputs = passes.finish(0)                the decoder's output for one pass, by its last state
    loss.backward()
    passes.backward(when_whole)               every pass back through the last layer, then the one before, ...

Equals `decoder(**arguments)` for each, and the backward pass of a loss of all of them. The device holds one
layer's activations of one pass; `states` keeps the layers' inputs between. Each layer is computed a second
time for its gradient. `weights.use(index)` puts a layer's weights on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge

from dpo_cache.lm.layerwise.record import LayerCall, Layers, finish, record
from dpo_cache.lm.layerwise.shared import Roots, SharedTensors
from dpo_cache.lm.layerwise.states import States
from dpo_cache.lm.layerwise.weights import LayerWeights
from dpo_cache.lm.routing import Routing

BOTTOM = -1  # the place of what is before the first layer


class RouterProbe(Protocol):
    """The object that adds up the routing of a mixture of experts over the layers of each pass, for its
    router loss.
    """

    def begin(self, uses: Sequence[torch.Tensor]) -> None:
        """Start with new passes; `uses` is how often each token of a pass counts, [L] or [B, L]."""
        ...

    def collect(self, place: int) -> AbstractContextManager[None]:
        """While open, a layer runs for the pass at this place: forward, or again for its gradient."""
        ...

    def routing(self, place: int) -> Routing | None:
        """The sums over all layers after the forward pass; the probabilities are a leaf."""
        ...

    def roots(self) -> Roots:
        """The probabilities of the layer that ran last, with the gradient that the leaf has collected."""
        ...


class NoRouters:
    """For losses without a router loss."""

    def begin(self, _: Sequence[torch.Tensor]) -> None:
        pass

    def collect(self, _: int) -> AbstractContextManager[None]:
        return nullcontext()

    def routing(self, _: int) -> None:
        return None

    def roots(self) -> Roots:
        return []


@dataclass
class _Pass:
    arguments: dict[str, Any]
    calls: list[LayerCall]
    bottom: GradientEdge | None
    state: Any  # ticket of the last state, in the backward pass of its gradient
    inputs: list[Any] = field(default_factory=list)  # tickets of the state before each layer
    finished: torch.Tensor | None = None  # the last state, a leaf
    has_ended: bool = False  # its top has: `state` is the gradient of the last state
    shared: SharedTensors = field(default_factory=SharedTensors)


class LayerPasses:
    """Passes of one step; see the module's docstring."""

    def __init__(
        self,
        layers: Layers,
        weights: LayerWeights,
        states: States,
        routers: RouterProbe | None = None,
    ):
        self.layers, self._weights, self._states = layers, weights, states
        self._routers = routers or NoRouters()
        self._passes: list[_Pass] = []
        self._keeps_inputs = True

    def forward(self, arguments: Sequence[dict[str, Any]]) -> None:
        """Run every pass through all layers; with gradients enabled, keep what the backward pass needs."""
        self._passes, self._keeps_inputs = [], torch.is_grad_enabled()
        with self._weights.use_bottom():
            for given in arguments:
                recording = record(self.layers, **given)
                state = self._states.put(recording.state)
                self._passes.append(_Pass(given, recording.calls, recording.bottom, state))
        for index in range(len(self.layers)):
            with self._weights.use(index, then=index + 1 if index + 1 < len(self.layers) else None):
                self._layer_forward(index)

    @torch.no_grad()
    def _layer_forward(self, index: int) -> None:
        for place, one in enumerate(self._passes):
            state = self._states.get(one.state)
            for other in self._passes[place + 1 : place + 2]:  # the next one
                self._states.expect(other.state)
            keeps = self._keeps_inputs
            with self._routers.collect(place):
                after = one.shared.run(one.calls[index], state) if keeps else one.calls[index].run(state)
            if keeps:
                one.inputs.append(one.state)
            one.state = self._states.put(after)

    def finish(self, place: int) -> Any:
        """The decoder's output for a pass, hidden states first; its graph ends at the last state."""
        one = self._passes[place]
        one.finished = self._states.get(one.state).detach().requires_grad_(torch.is_grad_enabled())
        return finish(self.layers, one.finished, **one.arguments)

    def end_top(self, place: int) -> None:
        """Keep the gradient of a pass's last state, and free the state; it has its whole gradient."""
        one = self._passes[place]
        if one.finished is not None:
            one.state = None if one.finished.grad is None else self._states.put(one.finished.grad)
            one.finished, one.has_ended = None, True
        elif not one.has_ended:
            one.state = None  # the loss does not depend on it

    def backward(self, when_whole: Callable[[int], None]) -> None:
        """Carry the gradients of the last states back to the parameters.

        `when_whole(index)` is called once the gradients of a layer have all their terms, and last with
        `BOTTOM`; no weights are in use then. A layer that is called several times is whole after its first
        call; parameters that layers share with others are the caller's to wait for.
        """
        for place in range(len(self._passes)):
            self.end_top(place)
        lowest = self._lowest_trained()
        for index in reversed(range(len(self.layers))):
            if index >= lowest:
                with self._weights.use(index, then=index - 1 if index > max(lowest, 0) else None):
                    for place, one in enumerate(self._passes):
                        self._layer_backward(index, place, one, continues=index > lowest)
            if index == self.layers.order.index(self.layers.order[index]):
                when_whole(index)
        # the bottom's graph has the copies that it was made with; new ones would hide their gradients
        for one in self._passes:
            self._bottom_backward(one)
        self._passes = []
        when_whole(BOTTOM)

    def drop(self) -> None:
        """Forget the passes."""
        self._passes = []

    def _lowest_trained(self) -> int:
        """The first layer that the backward pass has to reach: nothing before it needs a gradient. `BOTTOM`
        where what is before the layers needs one.
        """
        given = (argument for one in self._passes for call in one.calls for argument in call.tensors())
        if any(one.bottom is not None for one in self._passes) or any(one.requires_grad for one in given):
            return BOTTOM
        trained = (
            index
            for index, layer in enumerate(self.layers.order)
            if any(parameter.requires_grad for parameter in layer.parameters())
        )
        return next(trained, len(self.layers))

    def _layer_backward(self, index: int, place: int, one: _Pass, *, continues: bool) -> None:
        """Carry a pass's gradient through a layer; with `continues`, to the state before it."""
        state = self._states.get(one.inputs.pop()).detach().requires_grad_(continues)
        grad = None if one.state is None else self._states.get(one.state)
        for other in self._passes[place + 1 : place + 2]:  # the next one
            self._states.expect(other.inputs[-1])
        with torch.enable_grad(), self._routers.collect(place):
            after, roots, leaves = one.shared.run_again(one.calls[index], state)
        if grad is not None:
            roots.append((after, grad))
        _backward([*roots, *self._routers.roots()])
        one.state = None if state.grad is None else self._states.put(state.grad)
        one.shared.collect(leaves)

    def _bottom_backward(self, one: _Pass) -> None:
        roots = one.shared.roots()
        if one.state is not None and one.bottom is not None:
            roots.append((one.bottom, self._states.get(one.state)))
        _backward(roots)


def _backward(roots: Roots) -> None:
    roots = [(root, grad) for root, grad in roots if isinstance(root, GradientEdge) or root.requires_grad]
    if roots:
        torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])  # type: ignore[arg-type]
