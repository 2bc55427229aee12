"""The memory of a training step, counted without computing it and without a GPU.

    weights      all parameters, quantized ones included
    gradients    one for each trainable parameter
    optimizer    its state
    activations  the peak of the forward and backward pass above the others
    update       the peak of the optimizer's update above the others, which comes after the activations

Activations are counted by running the package's own passes on fake tensors, which have shapes and dtypes but
no values, and adding up the live ones (`planning/live_bytes.py`). The rest is arithmetic. Not counted: the
device's runtime (a CUDA context is some 0.3 to 0.6 GB), workspaces of its libraries, and fragmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo_cache.errors import OptionError
from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.forest.kernels import SEGMENTS, counted_kernel
from dpo_cache.lm.kernels.lora_linear import use_fast_lora
from dpo_cache.lm.kernels.onednn_linear import use_torch_linear
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.adapter import check_names, without_library_warnings
from dpo_cache.lm.model.lora_targets import without_unsuited_layers
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.model.towers import loading_class, make_empty_whole
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.planning.experts import use_counted_experts
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.planning.optimizer import optimizer_bytes, update_bytes
from dpo_cache.types import Completion

# Bytes of each weight of a quantized linear layer: 4-bit NF4 in blocks of 64 whose scales are quantized in
# blocks of 256 (Section 3, arXiv:2305.14314); 8 bits with one float16 scale a row, which is not counted.
# Embeddings and head are not quantized.
QUANTIZED_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of a training step, by their use. The activations are freed before the update begins."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update)


def config_footprint(
    config: PreTrainedConfig,
    completions: Sequence[Completion],
    *,
    dtype: torch.dtype = torch.float32,
    precision: str = "fp32",
    recomputation: str = "none",
    optimizer: str = "adamw",
    rounding: str | None = "auto",
    lora_r: int | None = None,
    quantize: str | None = None,
    device_type: str = "cuda",
) -> Footprint:
    """The footprint of this package's step on a device of that type, from a model's config only.

    `dtype` is that of the weights; `precision`, `optimizer` and `rounding` are those of `dpo-cache train`,
    `recomputation` its `gradient_checkpointing`; the completions are run in one forest, while gradients of
    earlier ones exist. Takes seconds, and hardly any memory.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(device_type):
        model = policy_of(build_fake(config, dtype, lora_r=lora_r), recomputation)
        run = pass_loss(completions, precision=precision)
        return step_footprint(model, run, optimizer=optimizer, rounding=rounding, quantize=quantize)


def step_footprint(
    model: PreTrainedModel,
    run: Callable[[PreTrainedModel], torch.Tensor],
    *,
    optimizer: str = "adamw",
    rounding: str | None = "auto",
    quantize: str | None = None,
    others: Sequence[PreTrainedModel] = (),
) -> Footprint:
    """The footprint of a step that already has gradients of earlier forests; `run` returns the loss of the
    next one.

    The model and `others`, of which only the weights count, are fake (`build_fake`). With `quantize`, linear
    layers count as quantized, plus the whole weights of the largest one, which its products need.
    """
    return standing_footprint(
        model,
        activation_bytes(model, run),
        optimizer=optimizer,
        rounding=rounding,
        quantize=quantize,
        others=others,
    )


def activation_bytes(model: PreTrainedModel, run: Callable[[PreTrainedModel], torch.Tensor]) -> int:
    """Peak bytes of the forward and backward pass above weights and gradients, of a fake or a real model."""
    return max(phase_peaks_of(model, run))


def phase_peaks_of(
    model: PreTrainedModel,
    run: Callable[[PreTrainedModel], torch.Tensor],
    *,
    others: Sequence[PreTrainedModel] = (),
) -> list[int]:
    """The peaks of `activation_bytes` in each phase: up to the end of each run of a decoder, of the model or
    of others that `run` calls, up to the loss, and in the backward pass.
    """
    for parameter in _trainable(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    peaks: list[int] = []
    with LiveBytes() as live, ExitStack() as stack:
        for decoder in map(decoder_of, (model, *others)):
            handle = decoder.register_forward_hook(lambda *_: peaks.append(live.take_peak()))
            stack.callback(handle.remove)
        loss = run(model)
        peaks.append(live.take_peak())
        loss.backward()
        peaks.append(live.take_peak())
    return peaks


def standing_footprint(
    model: PreTrainedModel,
    activations: int,
    *,
    optimizer: str = "adamw",
    rounding: str | None = "auto",
    quantize: str | None = None,
    others: Sequence[PreTrainedModel] = (),
) -> Footprint:
    """The footprint of a step whose activations are counted already; see `step_footprint`."""
    if quantize is not None:
        activations += max(_bytes([layer.weight]) for layer in quantizable(model))
    return Footprint(
        weights=sum(weight_bytes(one, quantize) for one in [model, *others]),
        gradients=_bytes(_trainable(model)),
        optimizer=optimizer_bytes(_trainable(model), optimizer, rounding),
        activations=activations,
        update=update_bytes(_trainable(model), optimizer, rounding),
    )


def pass_loss(
    completions: Sequence[Completion], *, precision: str = "fp32", attention: AttentionChoice | None = None
) -> Callable[[PreTrainedModel], torch.Tensor]:
    """The `run` of `step_footprint` for this package: a loss of the completions' log-probs, in one forest."""

    def run(model: PreTrainedModel) -> torch.Tensor:
        choice = attention or counted_attention(model, precision)
        (logps,) = PolicyModel(model, choice, precision=precision)([completions])
        return logps.sums().sum()

    return run


def counted_attention(model: PreTrainedModel, precision: str) -> AttentionChoice:
    """The attention for counting, where no value is computed and so no self-check is possible.

    In float32 it runs segment by segment: torch's kernel for sequences of various lengths has a backward
    pass, but no version of it for fake tensors (torch 2.13).
    """
    kernel = SEGMENTS if precision == "fp32" else counted_kernel(model)
    return AttentionChoice("forest", "nothing is computed", has_plain_head=True, kernel=kernel)


def pass_bytes(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    *,
    precision: str = "fp32",
) -> int:
    """Peak bytes above its weights of a loaded model's forward and backward pass over the completions, new
    gradients included.

    Gradients of earlier forests do not count and are not copied. Nothing is computed, and the model does not
    change; its mode of `Recomputation` applies. On a CPU, linear layers are counted as torch's own.
    """
    use_counted_experts()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with FakeCopyMode(mode):
            fake = copy.deepcopy(model)
        use_torch_linear(fake)
        with LiveBytes() as live:
            pass_loss(completions, precision=precision, attention=attention)(fake).backward()
    return live.peak


def build_fake(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    lora_r: int | None = None,
    lora_targets: str = "all-linear",
) -> PreTrainedModel:
    """A fake causal LM of this config in eval mode, to be called under a `FakeTensorMode`; with `lora_r`,
    frozen, with trainable float32 adapters at the layers that `lora_targets` of `dpo-cache train` names:
    all linear layers but the head, or names with commas."""
    use_counted_experts()
    with torch.device("meta"):
        kind = loading_class(config)
        if kind is None:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        else:
            model = make_empty_whole(kind, config, dtype)
        if lora_r is not None:
            _add_adapters(model, lora_r, lora_targets)
    return _off_meta(model).eval()


def policy_of(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """The model as this package trains it: forest attention, a mode of recomputation, fast LoRA layers."""
    use_forest_attention(model)
    if any("lora_" in name for name, _ in model.named_parameters()):
        use_fast_lora(model)
    Recomputation(model).mode = mode
    return model


def weight_bytes(model: PreTrainedModel, quantize: str | None = None) -> int:
    """Bytes of all parameters, with frozen linear layers, except the head, as quantized."""
    whole = _bytes(model.parameters())
    if quantize is None:
        return whole
    if quantize not in QUANTIZED_BYTES:
        raise OptionError(f"quantize {quantize!r}: not known.\nUse one of {', '.join(QUANTIZED_BYTES)}.")
    weights = [layer.weight for layer in quantizable(model)]
    quantized = QUANTIZED_BYTES[quantize] * sum(weight.numel() for weight in weights)
    return whole - _bytes(weights) + round(quantized)


def _trainable(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def quantizable(model: PreTrainedModel) -> Iterable[torch.nn.Linear]:
    """The frozen linear layers, without the head."""
    head = model.get_output_embeddings()
    return (
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and module is not head and not module.weight.requires_grad
    )


def _add_adapters(model: PreTrainedModel, rank: int, targets: str = "all-linear") -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    chosen = targets if targets == "all-linear" else targets.split(",")
    config: Any = LoraConfig(r=rank, target_modules=chosen)
    check_names(model, config)
    config = without_unsuited_layers(model, config, lambda _: None)
    with without_library_warnings():
        inject_adapter_in_model(config, model)
    cast_adapter_dtype(model, "default")


def _off_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The model with new tensors on the CPU, fake under a `FakeTensorMode`, for autocast does not work on the
    meta device. `to_empty` cannot swap fake tensors.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made.get(id(tensor))
    return model


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
