"""A step of the policy, layer by layer: pieces of completions in, log-probs out, and the gradient back.

    run = LayerMajorRun(policy, layers, weights, states)
    run.forward(pieces)                          all pieces through all layers
    logps = run.logps(0); loss(logps).backward(); run.end_top(0)
    run.backward(when_whole)                     all pieces back through all layers

The log-probs are those of `policy(pieces)`, and so are the gradients of the parameters, up to the order in
which terms are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dpo_cache.lm.device import autocast
from dpo_cache.lm.layerwise.passes import LayerPasses, NoRouters, RouterProbe
from dpo_cache.lm.layerwise.record import Layers
from dpo_cache.lm.layerwise.states import States
from dpo_cache.lm.layerwise.weights import LayerWeights
from dpo_cache.lm.policy import (
    CompletionLogps,
    PolicyModel,
    decoder_pass,
    join_logps,
    logps_of_run,
    run_at_once,
)
from dpo_cache.lm.rows import DecoderPass
from dpo_cache.types import Completion


@dataclass(frozen=True)
class _Batch:
    """Completions that are run at once, and the decoder's run of them."""

    completions: Sequence[Completion]
    decoder: DecoderPass


class LayerMajorRun:
    """The passes of one step at a time; see the module's docstring."""

    def __init__(
        self,
        policy: PolicyModel,
        layers: Layers,
        weights: LayerWeights,
        states: States,
        routers: RouterProbe | None = None,
    ):
        assert not policy.attention.is_whole, "a whole forward is not a decoder with layers"
        self._policy, self._model = policy, policy.model
        self._weights, self._routers = weights, routers or NoRouters()
        self._passes = LayerPasses(layers, weights, states, self._routers)
        self._batches: list[_Batch] = []
        self._places: list[range] = []  # the batches of each piece
        self._autocast = partial(autocast, self._model.device, policy.precision)

    def forward(self, pieces: Sequence[Sequence[Completion]]) -> None:
        """Run all pieces through all layers, each at once unless the model takes fewer completions."""
        self._batches, self._places = [], []
        for piece in pieces:
            start = len(self._batches)
            for completions in run_at_once(piece, self._policy.attention):
                one = decoder_pass(self._model, completions, self._policy.attention)
                self._batches.append(_Batch(completions, one))
            self._places.append(range(start, len(self._batches)))
        self._routers.begin([batch.decoder.uses for batch in self._batches])
        with self._autocast():
            self._passes.forward([batch.decoder.arguments for batch in self._batches])

    def logps(self, place: int) -> CompletionLogps:
        """The log-probs of a piece; their graph ends at the last states, which collect gradients."""
        with self._autocast():
            return join_logps([self._logps_of(batch) for batch in self._places[place]])

    def end_top(self, place: int) -> None:
        """Free what a piece's log-probs needed; the gradient of its loss has been taken."""
        for batch in self._places[place]:
            self._passes.end_top(batch)

    def backward(self, when_whole: Callable[[int], None]) -> None:
        """Carry the gradients to the parameters; `when_whole` as in `LayerPasses.backward`."""
        with self._autocast():
            self._passes.backward(when_whole)
        self._batches = []

    def drop(self) -> None:
        """Forget the pieces."""
        self._batches = []
        self._passes.drop()

    def _logps_of(self, place: int) -> CompletionLogps:
        batch, policy = self._batches[place], self._policy
        run = batch.decoder.read(self._passes.finish(place))
        logps = logps_of_run(
            self._model, run, batch.completions, policy.attention, with_squares=policy.with_squares
        )
        return logps._replace(routing=self._routers.routing(place))
