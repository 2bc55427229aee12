"""The routing of a mixture of experts whose layers run one by one, for its router loss.

In a plain run, transformers' hooks on the routers collect their logits while the decoder's forward is open.
Here the same hooks collect those of one layer at a time. A layer that runs again for its gradient hands in
its probabilities with the gradient that the loss has for the sums over all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError
from dpo_cache.lm.layerwise.record import outermost_layers
from dpo_cache.lm.layerwise.shared import Roots
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.routing import Routing, add_routings, measure_routing

KEY = "router_logits"  # the key in transformers' collectors


class CapturedRouters:
    """Implements `RouterProbe` for families whose router logits transformers' hooks collect.

    Raises `NotLayerMajorError` for a version of transformers without them, and, in `routing`, for layers
    whose logits they do not see.
    """

    def __init__(self, model: PreTrainedModel):
        try:
            from transformers.utils.output_capturing import _active_collector, maybe_install_capturing_hooks
        except ImportError as error:
            raise NotLayerMajorError(
                "this version of transformers has no hooks that collect router logits"
            ) from error
        self._collector = _active_collector
        maybe_install_capturing_hooks(_model_of_layers(model))
        self._num_chosen: int = model.config.get_text_config().num_experts_per_tok
        self._weights: list[torch.Tensor] = []  # for each pass, how often each of its tokens counts
        self._sums: dict[int, Routing] = {}  # by pass
        self._leaves: dict[int, Routing] = {}
        self._roots: Roots = []

    def begin(self, uses: Sequence[torch.Tensor]) -> None:
        """Start with new passes; `uses` is how often each token of a pass counts, [L] or [B, L]."""
        self._weights = [one.flatten() for one in uses]
        self._sums, self._leaves, self._roots = {}, {}, []

    @contextmanager
    def collect(self, place: int) -> Iterator[None]:
        """While open, a layer runs for the pass at this place: forward, or again for its gradient."""
        collected: dict[str, Any] = {KEY: []}
        token = self._collector.set(collected)
        try:
            yield
        finally:
            self._collector.reset(token)
        self._roots = []
        if not collected[KEY]:  # a layer without experts
            return
        # a model inside another one may have the hooks of both
        logits = [*{id(one): one for one in collected[KEY]}.values()]
        routing = measure_routing(logits, self._weights[place], self._num_chosen)
        if not torch.is_grad_enabled():
            before = [self._sums[place]] if place in self._sums else []
            self._sums[place] = add_routings([*before, routing])
        elif place in self._leaves and (grad := self._leaves[place].probs_E.grad) is not None:
            self._roots = [(routing.probs_E, grad)]

    def routing(self, place: int) -> Routing:
        """The sums over all layers of a pass; their probabilities are a leaf, which collects a gradient."""
        if place not in self._sums:
            raise NotLayerMajorError("the hooks of transformers see no router logits in its layers")
        self._leaves[place] = self._sums[place].detach()
        return self._leaves[place]

    def roots(self) -> Roots:
        """The probabilities of the layer that ran last, with their gradient."""
        return self._roots


def _model_of_layers(model: PreTrainedModel) -> Any:
    """The innermost model that has the layers; its forward opens the collector of a plain run."""
    decoder = decoder_of(model)
    first = outermost_layers(decoder)[0]
    models = [one for one in decoder.modules() if isinstance(one, PreTrainedModel)]
    return [one for one in models if any(module is first for module in one.modules())][-1]
