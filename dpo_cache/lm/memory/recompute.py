"""Activations that are computed again in the backward pass instead of kept.

    none        keeps all of them
    cheap       keeps all but tensors that cost next to nothing: the outputs of norms and activation
                functions, copies of keys (`recompute_later.py`)
    selective   keeps the outputs of matrix products and attention, and computes norms, activations, copies
                and adapters' products again
    full        keeps only each decoder layer's input, and computes the layer again

transformers' own switch works only in train mode; the policy stays in eval mode, which has no dropout.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from textwrap import dedent
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from dpo_cache.lm.device import autocast_dtype, release_free_bytes
from dpo_cache.lm.memory.recompute_later import is_on_tape, is_recording, recompute_later, recording
from dpo_cache.lm.memory.selective import KeptOutputs
from dpo_cache.lm.patches import Patches

MODES = ("none", "cheap", "selective", "full")


def ladder(precision: str) -> tuple[str, ...]:
    """The modes to try where memory is short, each of which keeps less than the one before.

    *selective* keeps less than *cheap* only under mixed precision, where *cheap* keeps wide inputs of norms
    and casts.
    """
    return ("cheap", "selective", "full") if precision == "bf16-mixed" else ("cheap", "full")


# Numbers that a layer keeps for the backward pass, per output of its linear layers; measured on a Llama.
FLOATS_KEPT = {"none": 2.7, "cheap": 1.2, "selective": 1.2, "full": 0.15}

EXPENSIVE = (
    "aten.mm", "aten.addmm", "aten.bmm", "aten._grouped_mm", "mkldnn._linear_pointwise",
    "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math_for_mps", "aten._flash_attention_forward",
    "aten._efficient_attention_forward", "dpo_cache.flex_attention", "bitsandbytes.gemm_4bit",
    "bitsandbytes.int8_scaled_mm", "bitsandbytes.int8_mixed_scaled_mm",
)  # fmt: skip

# modules whose classes are functions of a value
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")

# Products over at most this many numbers, as adapters of low rank compute them, are cheaper to repeat than to
# keep. By operator, which argument is multiplied.
NARROW = 64
NARROW_PRODUCTS = {"aten.mm": 0, "aten.addmm": 1, "mkldnn._linear_pointwise": 0}


# How often a forward pass returns free memory. On a CPU, glibc's heap does not fill the hole of a freed
# tensor with one of the same size, for its aligned allocation asks for more. So layers that keep tensors
# leave a hole for every temporary one: as much memory as they keep.
TRIMS_PER_PASS = 8


class Recomputation:
    """Wraps a model's decoder layers; `mode` may change from one forward pass to the next."""

    def __init__(self, model: PreTrainedModel, patches: Patches | None = None):
        self.mode = "none"
        self._kept = {found.default: name for name in EXPENSIVE if (found := _operator(name)) is not None}
        layers = decoder_layers(model)
        self.num_layers = len(layers)
        self._num_runs = 0  # runs of layers with gradients
        patches = patches or Patches()
        for layer in layers:
            for module in layer.modules():
                _recompute_cheap_output(module, patches)
            patches.wrap(layer, self._run)

    @contextmanager
    def using(self, mode: str) -> Iterator[None]:
        """While open, forward passes keep the activations of this mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def _run(self, _: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        output = self._run_recorded(forward, *args, **kwargs)
        self._num_runs += 1
        if self._num_runs % max(1, self.num_layers // TRIMS_PER_PASS) == 0:
            release_free_bytes(_device_of(args, kwargs))
        return output

    def _run_recorded(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output; `mode` decides which activations are kept."""
        if self.mode == "none":
            return forward(*args, **kwargs)
        if self.mode == "cheap":
            with recording():
                return forward(*args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.mode == "full":
            return checkpoint(forward, *args, **options, **kwargs)
        kept = KeptOutputs(self._is_kept)
        output = checkpoint(forward, *args, context_fn=kept.contexts, **options, **kwargs)
        kept.end_forward(output)
        return output

    def _is_kept(self, operator: Any, args: tuple[Any, ...]) -> bool:
        name = self._kept.get(operator)
        is_narrow = name in NARROW_PRODUCTS and args[NARROW_PRODUCTS[name]].shape[-1] <= NARROW
        return name is not None and not is_narrow


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a layer's hidden states are, its first tensor."""
    return next(value.device for value in (*args, *kwargs.values()) if torch.is_tensor(value))


def _recompute_cheap_output(module: torch.nn.Module, patches: Patches) -> None:
    """Let the backward pass compute the module's output again, if that takes next to no time."""
    kind = type(module)
    if _is_gated(kind):  # type: ignore[arg-type]  # mypy: __hash__ of torch's modules
        patches.wrap(module, _run_gated)
    elif kind is torch.nn.Linear:
        patches.before_forward(module, _cast_inputs)
    elif (
        not list(module.children())
        and ("Norm" in kind.__name__ or kind.__module__ in ACTIVATIONS)
        and not getattr(module, "inplace", False)
    ):
        patches.wrap(module, _run_cheap)


def _run_cheap(module: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """A norm or an activation function."""
    if kwargs or len(args) != 1:
        return forward(*args, **kwargs)
    return recompute_later(forward, *args, parameters=tuple(module.parameters()))


def _run_gated(module: Any, forward: Any, *args: Any) -> Any:
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`, where the input of `down_proj` is recomputed."""
    if not is_recording():
        return forward(*args)
    return module.down_proj(
        recompute_later(
            lambda gate, up: module.act_fn(gate) * up, module.gate_proj(*args), module.up_proj(*args)
        )
    )


def _cast_inputs(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a linear layer as autocast would. If the inputs are recomputed, so is the cast copy;
    otherwise keeping the copy takes less memory than keeping the inputs.
    """
    (inputs,) = args
    dtype = autocast_dtype(inputs.device)
    if dtype is None or inputs.dtype != torch.float32 or not is_on_tape(inputs):
        return args
    return (recompute_later(lambda tensor: tensor.to(dtype), inputs),)


@cache
def _is_gated(kind: type[torch.nn.Module]) -> bool:
    """Return whether the code of this class computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` and
    nothing else.
    """
    try:
        (function,) = ast.parse(dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError):
        return False
    assert isinstance(function, ast.FunctionDef)
    if len(function.args.args) != 2:
        return False
    code = [ast.unparse(line) for line in function.body]
    x = function.args.args[1].arg
    product = f"self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"
    result = code[-1].removeprefix("return ")
    return code in ([f"return {product}"], [f"{result} = {product}", f"return {result}"])


def activation_bytes(model: PreTrainedModel, num_tokens: int, mode: str) -> float:
    """Estimate of the memory that the layers keep for the backward pass of a forest."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    modules = [entry for layer in decoder_layers(model) for entry in layer.named_modules()]
    # adapters' products are added to the outputs of the base
    outputs = sum(_num_outputs(module, chosen) for name, module in modules if "lora_B" not in name)
    return FLOATS_KEPT[mode] * outputs * num_tokens * next(model.parameters()).element_size()


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that keep only their input under `full`."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _num_outputs(module: torch.nn.Module, num_chosen: int) -> int:
    """Size of a linear layer's output for a token; of experts with stacked weights, the sum over the chosen
    ones.
    """
    if isinstance(module, torch.nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    return num_chosen * sum(
        max(weight.shape[1:]) for weight in module.parameters(recurse=False) if weight.ndim == 3
    )


def _operator(name: str) -> Any:
    library, operator = name.split(".")
    return getattr(getattr(torch.ops, library), operator, None)
