"""Training steps that run layer by layer: the placement of weights, and the gradients of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.check_logps import FAILURES
from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.device import autocast
from dpo_cache.lm.forest.kernels import SEGMENTS
from dpo_cache.lm.gradient_sketches import GradientSketches
from dpo_cache.lm.layerwise.in_order import InOrder
from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import Layers, NotLayerMajorError, find_layers, outermost_layers
from dpo_cache.lm.layerwise.routing import CapturedRouters
from dpo_cache.lm.layerwise.self_check import is_float32, layer_major_problem, plain_gradients
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.states import states_on
from dpo_cache.lm.layerwise.streamed import PersistentCopies, StreamedWeights
from dpo_cache.lm.layerwise.transfer import Transfer
from dpo_cache.lm.layerwise.weights import LayerWeights, ResidentWeights
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.policy import CompletionLogps, PolicyModel
from dpo_cache.lm.rows import rows_pass
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.log import Log
from dpo_cache.options.placement import Placement
from dpo_cache.training.gradient_check import TOLERANCES_OF_KERNELS, first_right_kernel
from dpo_cache.training.optim.placed_gradients import PlacedGradients
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.ranks import Ranks
from dpo_cache.types import Completion


@dataclass(frozen=True)
class LayerMajorModel:
    """A model whose steps can run layer by layer, and the placement of its weights."""

    layers: Layers
    weights: LayerWeights
    placement: Placement

    def problem(
        self,
        policy: PolicyModel,
        *,
        has_routing: bool,
        recomputing: AbstractContextManager[None] | None = None,
    ) -> str:
        """The reason why steps of this policy would be wrong layer by layer; empty if they are right.

        `recomputing` is a mode of recomputation, which applies to the layers that run again.
        """
        if policy.attention.is_whole:
            return "its own forward is run as a whole"
        try:
            return layer_major_problem(
                policy,
                self.layers,
                self.weights,
                states_on(self.placement.inputs, policy.model.device),
                CapturedRouters(policy.model) if has_routing else None,
                recomputing,
            )
        except NotLayerMajorError as error:
            return str(error)

    def problem_of_mode(
        self, policy: PolicyModel, recomputation: Recomputation, mode: str, *, has_routing: bool
    ) -> str:
        """A description of how a mode of recomputation changes the gradient; empty if it does not, or if
        memory does not suffice for the check. `problem` has compared *none* already.
        """
        if mode == "none":
            return ""
        try:
            with recomputation.using("none"):  # for the plain run
                problem = self.problem(policy, has_routing=has_routing, recomputing=recomputation.using(mode))
        except RuntimeError as error:
            if not is_out_of_memory(error, policy.model.device):
                raise
            return ""
        return problem.removeprefix("it ")

    def with_right_kernel(self, policy: PolicyModel, log: Log, ranks: Ranks) -> AttentionChoice:
        """The policy's attention with the first kernel, starting with its own, whose gradient equals that of
        segments in plain runs of these weights.
        """
        attention = policy.attention
        if attention.name != "forest" or attention.kernel == SEGMENTS:
            return attention

        def gradients(kernel: str) -> GradientSketches:
            other = PolicyModel(policy.model, replace(attention, kernel=kernel), precision=policy.precision)
            return plain_gradients(other, self.layers, self.weights)

        def problem_of(kernel: str) -> str:
            try:
                problem = gradients(kernel).problem(
                    expected, is_fp32=is_float32(policy), tolerances=TOLERANCES_OF_KERNELS
                )
                problem = problem and f"gives another gradient than {SEGMENTS} ({problem})"
            except FAILURES as error:
                if is_out_of_memory(error, policy.model.device):
                    raise
                problem = f"fails ({first_line(error)})"
            return ranks.first_problem(problem)

        expected = gradients(SEGMENTS)
        return first_right_kernel(attention, policy.model.device, problem_of, log)


class LayerMajorSteps:
    """Runs the pieces of each step of a training run; see `LayerMajorRun`."""

    def __init__(
        self,
        policy: PolicyModel,
        model: LayerMajorModel,
        *,
        has_routing: bool,
        in_backward: OptimizerInBackward | None,
        ranks: Ranks | None = None,
    ):
        states = states_on(model.placement.inputs, policy.model.device)
        routers = CapturedRouters(policy.model) if has_routing else None
        self._run = LayerMajorRun(policy, model.layers, model.weights, states, routers)
        self._weights, self._name = model.weights, type(policy.model).__name__
        self.gradients = PlacedGradients(
            policy.model,
            model.layers,
            keeps_on_host=model.placement.gradients == "host",
            in_backward=in_backward,
            copies=model.weights if isinstance(model.weights, InOrder) else None,
            ranks=ranks,
        )

    def forward(self, pieces: Sequence[Sequence[Completion]]) -> None:
        """Run all pieces of a step through all layers; with gradients, if they are enabled.

        Raises `ModelError` if the model's code treats them in another way than it treated the rows of the
        check.
        """
        try:
            self._run.forward(pieces)
        except NotLayerMajorError as error:
            longest = max(len(completion) for piece in pieces for completion in piece)
            raise ModelError(
                f"{self._name} cannot run layer by layer in a step whose longest row has {longest} tokens, "
                f"though it can on short rows: {error}.\nUse `memory` fast."
            ) from error

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

    def backward(self, *, is_try: bool = False) -> None:
        """Propagate the gradients of the losses to the parameters, and move each layer's to its place. A step
        that is only tried updates nothing.
        """
        self._run.backward(self.gradients.try_take if is_try else self.gradients.take)

    def drop(self) -> None:
        """Forget a step that did not fit."""
        self._run.drop()
        self.gradients.end_step()


@contextmanager
def open_layer_major(
    model: PreTrainedModel,
    placement: Placement,
    device: torch.device,
    precision: str,
    streamed: StreamedWeights | None = None,
) -> Iterator[LayerMajorModel | str]:
    """Put the weights of a model where the placement has them, and find its layers; otherwise return the
    reason.

    A model whose weights are on the host computes on the device while the block is open. A model that cannot
    run so is moved to the device. `streamed` are weights that are already fetched. Raises `ModelError` for
    such a model if it has no values in memory.
    """
    with ExitStack() as stack:
        if streamed is not None:
            stack.callback(streamed.close)
        elif has_copies(placement, device):
            kind = PersistentCopies if placement.weights == "device" else StreamedWeights
            streamed = stack.enter_context(
                kind(
                    model,
                    outermost_layers(decoder_of(model)),
                    HostWeights(),
                    device,
                    compute_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
                    transfer=make_transfer(),
                    embedding="host",
                )
            )
        try:
            with autocast(device, precision if streamed else "fp32"):
                layers = layers_of(model)
        except NotLayerMajorError as error:
            problem = f"{type(model).__name__} cannot run layer by layer: {error}"
            if any(tensor.is_meta for tensor in model.parameters()):
                raise ModelError(f"{problem}.\nUse `memory` fast.") from error
            stack.close()
            model.to(device)  # type: ignore[arg-type]
            yield problem
            return
        weights: LayerWeights = ResidentWeights()
        if streamed is not None:
            weights = InOrder(streamed, [streamed.layers.index(layer) for layer in layers.order])
        yield LayerMajorModel(layers, weights, placement)


def has_copies(placement: Placement, device: torch.device) -> bool:
    """Return whether parameters are stored elsewhere than on the device; a CPU has only memory and disk."""
    if device.type == "cpu":
        return placement.weights == "disk"
    return placement.weights != "device" or placement.optimizer == "host"


def keeps_tables_on_host(placement: Placement, device: torch.device) -> bool:
    """Return whether frozen tables of embeddings are on the host, though the layers are on the device."""
    return not has_copies(placement, device) and device.type != "cpu" and placement.inputs == "host"


def make_transfer() -> Transfer | None:
    """The transfer of weights to the device; None: the default of the device."""
    return None


def layers_of(model: PreTrainedModel) -> Layers:
    """The layers of the model's decoder, in the order of their calls. Raises `NotLayerMajorError`."""
    rows = short_rows(model.config.get_text_config().vocab_size, 64)[:1]
    with torch.no_grad():
        return find_layers(model, **rows_pass(model, rows).arguments)
