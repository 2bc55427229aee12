"""Steps of a run layer by layer: where the weights are, and how a step reaches its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.layerwise.in_order import InOrder
from dpo_cache.lm.layerwise.passes import RouterProbe
from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import Layers, NotLayerMajorError, find_layers, outermost_layers
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.states import states_on
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.lm.layerwise.weights import LayerWeights, ResidentWeights
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.policy import CompletionLogps, PolicyModel
from dpo_cache.lm.rows import rows_pass
from dpo_cache.options.placement import Placement
from dpo_cache.training.optim.placed_gradients import PlacedGradients
from dpo_cache.types import Completion


@dataclass(frozen=True)
class LayerMajorModel:
    """A model whose steps can run layer by layer, and where its weights are."""

    layers: Layers
    weights: LayerWeights
    placement: Placement


class LayerMajorSteps:
    """Runs the pieces of each step of a training run; see `LayerMajorRun`."""

    def __init__(
        self,
        policy: PolicyModel,
        model: LayerMajorModel,
        gradients: PlacedGradients,
        routers: RouterProbe | None,
    ):
        states = states_on(model.placement.inputs, policy.model.device)
        self._run = LayerMajorRun(policy, model.layers, model.weights, states, routers)
        self._weights = model.weights
        self.gradients = gradients

    def forward(self, pieces: Sequence[Sequence[Completion]]) -> None:
        """Run all pieces of a step through all layers; with gradients, if these are enabled."""
        self._run.forward(pieces)

    @contextmanager
    def top(self) -> Iterator[LayerMajorRun]:
        """While open, `logps(place)` and `end_top(place)` of the run may be called."""
        with self._weights.use_top():
            yield self._run
        self.gradients.take_top()

    def logps(self, pieces: Sequence[Sequence[Completion]]) -> list[CompletionLogps]:
        """The log-probs of pieces, without gradients."""
        with torch.no_grad():
            self.forward(pieces)
            with self._weights.use_top():
                return [self._run.logps(place) for place in range(len(pieces))]

    def backward(self) -> None:
        """Carry the gradients of the losses to the parameters, and each layer's to its place."""
        self._run.backward(self.gradients.take)


@contextmanager
def open_layer_major(
    model: PreTrainedModel, placement: Placement, device: torch.device, precision: str
) -> Iterator[LayerMajorModel | str]:
    """Put the weights of a model where the placement has them, and find its layers; else the reason in words.

    A model whose weights are on the host computes on the device while the block is open. One that is refused
    is moved to the device.
    """
    with ExitStack() as stack:
        streamed: StreamedWeights | None = None
        if model.device != device:
            modules = outermost_layers(decoder_of(model))
            mixed = torch.bfloat16 if precision == "bf16-mixed" else None
            streamed = stack.enter_context(
                StreamedWeights(model, modules, HostWeights(), device, compute_dtype=mixed, embedding="host")
            )
        try:
            layers = layers_of(model)
        except NotLayerMajorError as error:
            stack.close()
            model.to(device)  # type: ignore[arg-type]
            yield f"{type(model).__name__} cannot run layer by layer: {error}"
            return
        weights: LayerWeights = ResidentWeights()
        if streamed is not None:
            weights = InOrder(streamed, [streamed.layers.index(layer) for layer in layers.order])
        yield LayerMajorModel(layers, weights, placement)


def layers_of(model: PreTrainedModel) -> Layers:
    """The layers of the model's decoder, in the order of their calls. Raises `NotLayerMajorError`."""
    rows = short_rows(model.config.get_text_config().vocab_size, 64)[:1]
    with torch.no_grad():
        return find_layers(model, **rows_pass(model, rows).arguments)


def move_trained(model: torch.nn.Module, device: torch.device) -> None:
    """Move the parameters that are trained, an adapter's, to the device."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
