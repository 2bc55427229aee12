"""Forward passes without gradients, a window of them through one layer before the next: for scoring.

    layer_major = LayerMajor(layers, weights, device, window_bytes=2**30)
    for done in layer_major.run(passes):
        done.result        what a pass makes of the decoder's output, which is that of a plain run to the bit

Each window reads the weights once; a layer's are on the device only while it runs. A window has as many
passes as the memory for their states allows, and as the time that a crash may cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dpo_cache.lm.layerwise.disk import DiskWeights
from dpo_cache.lm.layerwise.meter import Meter
from dpo_cache.lm.layerwise.paths import CarriedPaths
from dpo_cache.lm.layerwise.record import LayerCall, Layers, Recording, finish, record
from dpo_cache.lm.layerwise.states import States, states_on
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.lm.layerwise.weights import LayerWeights
from dpo_cache.types import Completion

PLAN_SHARE = 2.0  # memory of a pass on the device, with what its attention's plan keeps; without it: 1


@dataclass(frozen=True)
class Pass:
    """One run of the decoder."""

    arguments: dict[str, Any] | None  # None: there is nothing to run, and `read` gets None
    read: Callable[[Any], Any]  # the decoder's output -> the result; the LM head may be used
    num_tokens: int
    paths: CarriedPaths | None = None  # paths of its stream; its plan uses `paths.current`
    first_depth: int = 0  # tokens of the open path that the chunk continues


@dataclass(frozen=True)
class Done:
    """A layer that a window has passed, or a pass that has ended."""

    num_tokens: int  # run since the last one; their sum is that of the passes
    place: int | None = None  # index of the pass; None: a layer
    result: Any = None
    ends_window: bool = False


@dataclass
class LayerMajor:
    """Runs passes through a decoder, or a whole model, layer by layer.

    `window_bytes` of the host are for what a window keeps between two layers, its states above all, and
    `device_bytes` for what its layers are given, where that is on a device with memory of its own.
    `window_tokens` replaces the bound by time.
    """

    layers: Layers
    weights: LayerWeights
    device: torch.device
    window_bytes: int
    device_bytes: int | None = None
    window_tokens: int | None = None
    # a row, and its log-probs by a plain call of the model, which the self-check compares
    witness: tuple[Completion, torch.Tensor] | None = None
    streamed: StreamedWeights | None = None  # the weights of all layers, if they are not on the device
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self._states = states_on("host", self.device)

    def around(self, module: torch.nn.Module) -> LayerMajor:
        """The same for another module with these layers: the whole model in place of its decoder."""
        return replace(self, layers=replace(self.layers, decoder=module))

    @property
    def readings(self) -> tuple[str, int, int]:
        """Where streamed weights are read from, how often that was, and the bytes read."""
        assert self.streamed is not None
        ring, source = self.streamed.ring, self.streamed.source
        count = math.ceil(ring.num_fetches / len({*self.streamed.layers}))
        if isinstance(source, DiskWeights):
            return "disk", count, source.num_bytes_read
        return "host", count, ring.num_bytes

    @torch.no_grad()
    def run(self, passes: Iterator[Pass]) -> Iterator[Done]:
        """Yield each layer that a window has passed, then the results of its passes, in order."""
        place, following = 0, next(passes, None)
        while following is not None:
            window = _Window(self.layers, self._states)
            with self.weights.use_bottom():
                while following is not None and not self._is_full(window, following):
                    window.add(following)
                    following = next(passes, None)
            yield from self._through_layers(window, following)
            with self.weights.use_top():
                results = window.finish()
            for number, result in enumerate(results, 1):
                yield Done(0, place, result, ends_window=number == len(results))
                place += 1

    def results(self, passes: Sequence[Pass]) -> list[Any]:
        """The results of the passes, in order."""
        return [done.result for done in self.run(iter(passes)) if done.place is not None]

    def _is_full(self, window: _Window, following: Pass) -> bool:
        num_passes = len(window.passes)
        if not num_passes:
            return False
        growth = 1 + 1 / num_passes
        if window.num_bytes * growth > self.window_bytes:
            return True
        if self.device_bytes is not None and PLAN_SHARE * window.given_bytes * growth > self.device_bytes:
            return True
        num_tokens = window.num_tokens + following.num_tokens
        return num_tokens > (self.meter.most_tokens if self.window_tokens is None else self.window_tokens)

    def _through_layers(self, window: _Window, following: Pass | None) -> Iterator[Done]:
        num_layers, num_tokens = len(self.layers), window.num_tokens
        watch = self.meter.start(self.device)
        for index in range(num_layers):
            is_end = following is None and index + 1 == num_layers
            weights = self.weights.use(index, then=None if is_end else (index + 1) % num_layers)
            with watch.waiting_for(weights), window.paths_of(index, following):
                window.run_layer(index)
            yield Done(num_tokens * (index + 1) // num_layers - num_tokens * index // num_layers)
        watch.stop(num_tokens)


class _Window:
    """Passes on their way through the layers; their states are on the host."""

    def __init__(self, layers: Layers, states: States):
        self._layers, self._states = layers, states
        self.passes: list[Pass] = []
        self.num_tokens = self.num_bytes = self.given_bytes = 0
        self._calls: list[list[LayerCall]] = []  # calls of each pass; none if there is nothing to run
        self._tickets: list[Any] = []

    def add(self, given: Pass) -> None:
        self.passes.append(given)
        self.num_tokens += given.num_tokens
        calls, ticket = [], None
        if given.arguments is not None:
            recording = record(self._layers, **given.arguments)
            given_bytes = _bytes_given(recording)
            self.given_bytes += given_bytes
            self.num_bytes += given_bytes + recording.state.nbytes
            calls, ticket = recording.calls, self._states.put(recording.state)
        self._calls.append(calls)
        self._tickets.append(ticket)

    @contextmanager
    def paths_of(self, index: int, following: Pass | None) -> Iterator[None]:
        """While open, the streams of the passes have the keys and values of a layer; afterwards those are
        kept that the next window continues.
        """
        with ExitStack() as stack:
            for paths in {one.paths for one in self.passes if one.paths is not None}:
                continues = following if following is not None and following.paths is paths else None
                stack.enter_context(paths.of(index, continues.first_depth if continues else 0))
            yield

    def run_layer(self, index: int) -> None:
        for place, state in self._each_state():
            self._tickets[place] = self._states.put(self._calls[place][index].run(state))

    def finish(self) -> list[Any]:
        """The results of the passes."""
        results: list[Any] = [one.read(None) if one.arguments is None else None for one in self.passes]
        for place, state in self._each_state():
            one, self._tickets[place] = self.passes[place], None
            assert one.arguments is not None
            results[place] = one.read(finish(self._layers, state, **one.arguments))
        return results

    def _each_state(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the places of the passes that run, and their states; each next one is fetched meanwhile."""
        places = [place for place, calls in enumerate(self._calls) if calls]
        for number, place in enumerate(places):
            state = self._states.get(self._tickets[place])
            for other in places[number + 1 : number + 2]:
                self._states.expect(self._tickets[other])
            yield place, state


def _bytes_given(recording: Recording) -> int:
    """Memory of what the layers of a pass are given besides the state: rotary tables, masks and the like."""
    given = tree_leaves([(call.args, call.kwargs) for call in recording.calls])
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in given
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())
