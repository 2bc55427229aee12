"""A policy whose weights are cut into a shard a rank, by torch's FSDP2; a layer is whole while it runs.

    sharded = shard(model, device)
    logps = sharded.run(lambda: ...)    a forward pass, of which a backward pass may follow
    with sharded.gathered(): ...        many forward passes without gradients

Each rank has the same number of rows of a parameter, the last ranks fewer or none. All ranks run the same
passes, for a layer's weights are gathered when it runs, and its gradients are reduced, to their mean over the
ranks, when its part of a backward pass has ended.

The shards are plain parameters to those who update them: `LocalShard.parameter` shares the memory of this
rank's rows, and gets their gradient.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.record import outermost_layers
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.model.quantization import is_quantized

Value = TypeVar("Value")


@dataclass(frozen=True)
class LocalShard:
    """This rank's rows of a trained parameter: `start` to `stop` of the first dimension."""

    parameter: torch.nn.Parameter  # plain; shares the memory of the rows
    shape: torch.Size  # shape of the whole parameter
    start: int
    stop: int


class ShardedModel:
    """A model that `shard` has cut, and what runs it."""

    def __init__(self, root: Any, model: PreTrainedModel, layers: list[torch.nn.Module]):
        self._root = root
        # since the last run began: of a layer with gradients, and of the gradients of a parameter
        self._num_runs = Counter[torch.nn.Module]()
        self._num_gradients = Counter[torch.Tensor]()
        with torch.no_grad():
            self.run(lambda: None)  # FSDP2 takes the first module that runs for the outermost one
        owners = {parameter: layer for layer in layers for parameter in layer.parameters()}
        self.shards = {
            name: self._local_shard(parameter, owners.get(parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        for layer in layers:
            layer.register_forward_pre_hook(self._count_run)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """This rank's rows of the trained parameters, by name."""
        return {name: shard.parameter for name, shard in self.shards.items()}

    def run(self, function: Callable[[], Value]) -> Value:
        """`function()`, which runs the decoder and the head; with gradients, the backward pass follows."""
        self._num_runs.clear()
        self._num_gradients.clear()
        try:
            output: Value = self._root(function)
        except BaseException:
            self._root.reset_iter_state()
            raise
        if not torch.is_grad_enabled():  # no backward pass does it
            self._root.reshard()
        return output

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While open, all weights outside of the layers are whole, and parts of the model can be called one
        by one, without gradients; passes may fail.
        """
        with torch.no_grad():
            self._root.unshard()
            try:
                yield
            finally:
                self._root.reset_iter_state()

    def reset(self) -> None:
        """A backward pass has failed; the next pass may begin."""
        self._root.reset_iter_state()

    def _count_run(self, layer: torch.nn.Module, _: Any) -> None:
        if torch.is_grad_enabled():
            self._num_runs[layer] += 1

    def _local_shard(self, parameter: torch.nn.Parameter, layer: torch.nn.Module | None) -> LocalShard:
        """The rows of a cut parameter of a layer, or of none; they get its gradients."""
        rows = local_rows(parameter.detach())
        plain = torch.nn.Parameter(rows)
        assert plain.data_ptr() == rows.data_ptr()
        per_rank = -(-parameter.shape[0] // torch.distributed.get_world_size())
        start = min(torch.distributed.get_rank() * per_rank, parameter.shape[0])
        parameter.register_post_accumulate_grad_hook(partial(self._move_gradient, plain, layer))
        return LocalShard(plain, parameter.shape, start, start + len(rows))

    @torch.no_grad()
    def _move_gradient(
        self, plain: torch.nn.Parameter, layer: torch.nn.Module | None, parameter: torch.Tensor
    ) -> None:
        """Add a reduced gradient to that of the rows. The hooks of these are called when it is whole: FSDP2
        reduces the gradient of each run of a layer.
        """
        assert parameter.grad is not None
        gradient, parameter.grad = local_rows(parameter.grad), None
        plain.grad = gradient if plain.grad is None else plain.grad.add_(gradient)
        self._num_gradients[parameter] += 1
        if layer is None or self._num_gradients[parameter] >= self._num_runs[layer]:
            for hook in (plain._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(plain)


class _Root(torch.nn.Module):
    """The outermost module: its forward is whatever runs the model inside it."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Value]) -> Value:
        return function()


def shard(
    model: PreTrainedModel, device: torch.device, fill: Callable[[torch.nn.Module], None] = lambda _: None
) -> ShardedModel:
    """Cut the weights of a model on the host into shards on the device, layer after layer.

    `fill` gives a layer its weights, if they have no values before. Each rank calls this, with the default
    process group initialised. Raises `ModelError` for a model that cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ModelError(
            f"`parallel` fsdp: torch {torch.__version__} has an FSDP2 that does not recover from an error.\n"
            "Install torch 2.13 or later, or use `parallel` ddp."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where FSDP2 puts shards
    layers = [*dict.fromkeys(outermost_layers(decoder_of(model)))]
    _check(model, layers)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # a sum of bf16 gradients over the ranks is rounded once
    cut = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in layers:
        fill(layer)
        _make_contiguous(layer)
        layer.register_forward_hook(_copy_views)
        cut(layer)
    _make_contiguous(model)
    root = _Root(model)
    root.train(model.training)
    cut(root, reshard_after_forward=False)
    # some experts may be used on one rank only
    root.set_reduce_scatter_unused_params(True)  # type: ignore[operator]  # mypy: Tensor | Module
    return ShardedModel(root, model, layers)


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that may be cut; of another one, all."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _check(model: PreTrainedModel, layers: list[torch.nn.Module]) -> None:
    """Raise `ModelError` for weights that FSDP2 does not take."""
    owners = {inner: layer for layer in layers for inner in layer.modules()}
    units = defaultdict[torch.nn.Module, dict[str, torch.nn.Parameter]](dict)  # gathered together
    for prefix, module in model.named_modules():
        units[owners.get(module, model)].update(module.named_parameters(prefix, recurse=False))
    problem = "its weights are quantized" if is_quantized(model) else ""
    seen: dict[torch.nn.Parameter, torch.nn.Module] = {}
    for unit, parameters in units.items():
        trained = {str(one.dtype).removeprefix("torch.") for one in parameters.values() if one.requires_grad}
        if len(trained) > 1:
            problem = f"trained weights that are gathered together are in {' and '.join(sorted(trained))}"
        for path, parameter in parameters.items():
            if not parameter.ndim:
                problem = f"{path} is one number"
            if seen.setdefault(parameter, unit) is not unit:
                problem = f"{path} is shared with another layer"
    if problem:
        raise ModelError(
            f"`parallel` fsdp: {type(model).__name__} cannot be cut into shards: {problem}.\n"
            "Use `parallel` ddp."
        )


def _copy_views(_layer: torch.nn.Module, _args: Any, output: Any) -> Any:
    """The output with copies of views: a change of a view in place would lose the hook by which FSDP2 gathers
    the layer's weights for the backward pass.
    """
    return tree_map_only(
        torch.Tensor,
        lambda one: one.clone() if one.requires_grad and one._base is not None else one,
        output,
    )


def _make_contiguous(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
