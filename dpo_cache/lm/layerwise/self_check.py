"""A check that a model which runs layer by layer gives the log-probs and the gradients of its plain run.

    problem = layer_major_problem(policy, layers, weights, states, routers)

Compares two pieces of short made-up rows, which pass the layers in turns, so that what a layer keeps from one
pass to the next shows. Of each parameter's gradient, a sketch is compared (`gradient_sketches.py`), so that
neither run holds more than one layer's gradients. It shows what a layer-major run can lose: the gradient of
an argument that layers share, a term of a tied weight, a layer that is skipped or counted twice, a parameter
whose gradient grows after its layer is whole.

The plain run works for weights that are on the device only while their layer runs, too: its backward pass
fetches them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from dpo_cache.errors import first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.check_logps import FAILURES, TOLERANCES
from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.gradient_sketches import GradientSketches
from dpo_cache.lm.layerwise.copies import leaf_of
from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError, replaced_forwards
from dpo_cache.lm.layerwise.passes import BOTTOM, RouterProbe
from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import Layers
from dpo_cache.lm.layerwise.states import States
from dpo_cache.lm.layerwise.weights import LayerWeights
from dpo_cache.lm.layerwise.whole import parameters_when_whole
from dpo_cache.lm.model.quantization import rounding_dtype
from dpo_cache.lm.policy import CompletionLogps, PolicyModel
from dpo_cache.types import Completion


class _Found(NamedTuple):
    """Results of a run: of each piece, and of each parameter."""

    logps: list[CompletionLogps]
    gradients: GradientSketches


def layer_major_problem(
    policy: PolicyModel,
    layers: Layers,
    weights: LayerWeights,
    states: States,
    routers: RouterProbe | None = None,
    recomputing: AbstractContextManager[None] | None = None,
) -> str:
    """Why a layer-major run of this policy is not its plain run, in words; empty if it is.

    `recomputing` is open during the layer-major run only: a mode of recomputation, to check it, too. No
    gradient is left behind, not even one that was there before. Raises only for a lack of memory.
    """
    pieces = check_pieces(policy)
    try:
        policy.model.zero_grad(set_to_none=True)
        expected = _plain_run(policy, layers, weights, pieces)
        run = LayerMajorRun(policy, layers, weights, states, routers)
        with recomputing or nullcontext():
            found = _layer_major_run(policy, layers, weights, run, pieces)
    except (NotLayerMajorError, *FAILURES) as error:
        if is_out_of_memory(error, policy.model.device):
            raise
        return str(error) if isinstance(error, NotLayerMajorError) else f"it fails ({first_line(error)})"
    finally:
        _drop_gradients(policy, layers, weights)
    return _problem(policy, found, expected)


def plain_gradients(policy: PolicyModel, layers: Layers, weights: LayerWeights) -> GradientSketches:
    """The gradients of the check's rows by a plain run, wherever the weights are. None is left behind."""
    policy.model.zero_grad(set_to_none=True)
    try:
        return _plain_run(policy, layers, weights, check_pieces(policy)).gradients
    finally:
        _drop_gradients(policy, layers, weights)


def is_float32(policy: PolicyModel) -> bool:
    """Return whether all numbers of a run are float32, which bounds the rounding of its gradients."""
    return policy.precision == "fp32" and rounding_dtype(policy.model) == torch.float32


def _drop_gradients(policy: PolicyModel, layers: Layers, weights: LayerWeights) -> None:
    policy.model.zero_grad(set_to_none=True)
    for key in (*range(len(layers)), "bottom", "top"):
        for _, copy in _copies(weights, key):
            copy.grad = None


def check_pieces(policy: PolicyModel) -> list[list[Completion]]:
    """The pieces that are compared, of different lengths."""
    rows = short_rows(policy.model.config.get_text_config().vocab_size, 64)
    return [rows[:2], rows[2:]]


def _problem(policy: PolicyModel, found: _Found, expected: _Found) -> str:
    is_fp32 = is_float32(policy)
    largest_allowed, mean_allowed = TOLERANCES[torch.float32 if is_fp32 else torch.bfloat16]
    for one, other in zip(found.logps, expected.logps, strict=True):
        gaps = (one.tokens_T - other.tokens_T).detach().abs()
        if not (float(gaps.max()) <= largest_allowed and float(gaps.mean()) <= mean_allowed):
            return f"it gives other log-probs than the plain run (by up to {float(gaps.max()):.2g} nats)"
        if one.routing and other.routing and not _is_same_routing(one, other, is_fp32=is_fp32):
            return "it gives another router loss than the plain run"
    problem = found.gradients.problem(expected.gradients, is_fp32=is_fp32)
    return f"it gives another gradient than the plain run ({problem})" if problem else ""


def _is_same_routing(one: CompletionLogps, other: CompletionLogps, *, is_fp32: bool) -> bool:
    assert one.routing is not None and other.routing is not None
    gaps = (one.routing.probs_E - other.routing.probs_E).detach().abs() / other.routing.num_rows
    is_close = float(gaps.max()) <= (1e-4 if is_fp32 else 2e-2)
    return is_close and float(one.routing.num_rows) == float(other.routing.num_rows)


def _loss(logps: CompletionLogps) -> torch.Tensor:
    """A loss that raises some answers and lowers others, and has a term of the routing."""
    sums = logps.sums()
    loss = (sums * torch.linspace(0.5, -0.4, len(sums), dtype=sums.dtype, device=sums.device)).sum()
    if logps.routing is None:
        return loss
    return loss + logps.routing.probs_E.square().sum() / logps.routing.num_rows


def _layer_major_run(
    policy: PolicyModel,
    layers: Layers,
    weights: LayerWeights,
    run: LayerMajorRun,
    pieces: Sequence[Sequence[Completion]],
) -> _Found:
    sketches, logps = GradientSketches(), list[CompletionLogps]()
    names, whole = _names(policy.model), set[str]()
    homes = [*policy.model.named_parameters()]
    by_id = {id(parameter): name for name, parameter in homes}
    when_whole = parameters_when_whole(policy.model, layers)

    def take(index: int) -> None:
        """Take the gradients that are there; they are in the parameters, or in their copies."""
        keys = ("bottom", "top") if index == BOTTOM else (index,)
        copies = [one for key in keys for one in _copies(weights, key)]
        for name, tensor in (*homes, *copies):
            if tensor.grad is not None and names[name] in whole:
                raise NotLayerMajorError(f"the gradient of {name} grows after its layer is left")
            sketches.take(names[name], tensor)
        whole.update(by_id[id(parameter)] for parameter in when_whole[index])

    run.forward(pieces)
    with weights.use_top():
        for place in range(len(pieces)):
            logps.append(run.logps(place))
            _loss(logps[-1]).backward()
            run.end_top(place)
    run.backward(take)
    return _Found(logps, sketches)


def _plain_run(
    policy: PolicyModel, layers: Layers, weights: LayerWeights, pieces: Sequence[Sequence[Completion]]
) -> _Found:
    with ExitStack() as stack:
        hooks = stack.enter_context(_Hooks(policy.model))
        # each end is opened once, so that all pieces have the same copies of its parameters
        stack.enter_context(weights.use_bottom())
        stack.enter_context(weights.use_top())
        hooks.add(policy.model)
        stack.enter_context(_opened_layers(layers, weights, hooks))
        logps = []
        for piece in pieces:
            logps += policy([piece])
            _loss(logps[-1]).backward()
    return _Found(logps, hooks.sketches)


class _Hooks:
    """Sketch and free each gradient as soon as it has come to a parameter, or to a copy of one."""

    def __init__(self, model: torch.nn.Module):
        self.sketches = GradientSketches()
        self._names = _names(model)
        self._modules = {module: name for name, module in model.named_modules()}
        self._hooked: dict[int, tuple[torch.Tensor, Any]] = {}  # by id

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *raised: object) -> None:
        for _, handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def add(self, module: torch.nn.Module) -> None:
        """Watch the tensors that are now in the places of a module's parameters."""
        prefix = self._modules[module]
        for inner, tensor in module.named_parameters(prefix, remove_duplicate=False):
            if tensor.requires_grad and id(tensor) not in self._hooked:
                take = partial(self.sketches.take, self._names[inner])
                handle = leaf_of(tensor).register_post_accumulate_grad_hook(take)
                self._hooked[id(tensor)] = tensor, handle


@contextmanager
def _opened_layers(layers: Layers, weights: LayerWeights, hooks: _Hooks) -> Iterator[None]:
    """Let each layer run with its weights; those that its backward pass needs are fetched again then."""
    places = {layer: index for index, layer in reversed([*enumerate(layers.order)])}

    def run(layer: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        copies = _CopiesInUse(weights, layer, places[layer])
        with weights.use(places[layer]), saved_tensors_hooks(copies.pack, copies.unpack):
            hooks.add(layer)
            return forward(*args, **kwargs)

    with replaced_forwards(places, run):
        yield


class _CopiesInUse:
    """A placeholder that a graph keeps for the copies of a layer's weights, whose memory is used again."""

    def __init__(self, weights: LayerWeights, layer: torch.nn.Module, index: int):
        self._weights, self._layer, self._index = weights, layer, index
        self._homes = {id(tensor) for tensor in self._tensors()}

    def pack(self, tensor: torch.Tensor) -> Any:
        """The tensor, or the place in its copy."""
        memory = tensor.untyped_storage()._cdata
        if not any(memory == copy.untyped_storage()._cdata for copy in self._copies()):
            return tensor
        return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        dtype, *place = packed
        with self._weights.use(self._index), torch.no_grad():
            memory = next(self._copies())
            view = torch.empty(0, dtype=dtype, device=memory.device)
            return view.set_(memory.untyped_storage(), *place).clone()

    def _copies(self) -> Iterator[torch.Tensor]:
        """Those that are in the places of the layer's tensors now; they share their memory."""
        return (tensor for tensor in self._tensors() if id(tensor) not in self._homes)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._layer.parameters()
        yield from self._layer.buffers()


def _copies(weights: LayerWeights, key: int | str) -> list[tuple[str, torch.Tensor]]:
    """The copies on the device of parameters whose home is elsewhere, with the parameters' names."""
    leaves = getattr(weights, "leaves", None)
    return [] if leaves is None else [*leaves(key).items()]


def _names(model: torch.nn.Module) -> dict[str, str]:
    """One name for each of the names of a parameter."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}
