"""What a training step holds in memory, counted without computing it and without a GPU.

    weights      what the parameters take, quantized ones included
    gradients    one a trainable parameter
    optimizer    its state
    activations  what forward and backward pass hold at most above those

Activations are counted by running the package's own passes on fake tensors, which have shapes and dtypes and
no values, and adding up what lives (`lm/live_bytes.py`). The rest is arithmetic. Not counted: what a device's
runtime takes for itself (a CUDA context is some 0.3 to 0.6 GB), workspaces of its libraries, and what its
allocator loses to fragmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo_cache.errors import OptionError
from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.kernels.lora_linear import use_fast_lora
from dpo_cache.lm.kernels.onednn_linear import use_torch_linear
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.types import Completion

# Bytes that `quantize` leaves of each weight of a linear layer: 4-bit NF4 in blocks of 64 whose scales are
# quantized themselves,
# in blocks of 256 (Section 3, arXiv:2305.14314); 8 bits with one float16 scale a row, which is left out.
# Embeddings and head stay as they are.
QUANTIZED_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}

# Bytes of state a weight: two moments of its own dtype; in 8 bits two bytes and two float32 scales a block of
# 256 weights, where a tensor
# has at least 4,096 of them, else two float32.
OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor", "none")
LEAST_FOR_8BIT = 4096


@dataclass(frozen=True)
class Footprint:
    """Most bytes that a training step holds, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def config_footprint(
    config: PreTrainedConfig,
    completions: Sequence[Completion],
    *,
    dtype: torch.dtype = torch.float32,
    precision: str = "fp32",
    recomputation: str = "none",
    optimizer: str = "adamw",
    lora_r: int | None = None,
    quantize: str | None = None,
    device_type: str = "cuda",
) -> Footprint:
    """The footprint of this package's step on a device of that type, of a model of which there is nothing but
    its config.

    `dtype` is the weights', `precision` that of `dpo-cache train`, `recomputation` its
    `gradient_checkpointing`; the completions are run in one forest, with gradients of earlier ones standing.
    Takes seconds, and no memory to speak of.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(device_type):
        model = policy_of(build_fake(config, dtype, lora_r=lora_r), recomputation)
        return step_footprint(
            model, pass_loss(completions, precision=precision), optimizer=optimizer, quantize=quantize
        )


def step_footprint(
    model: PreTrainedModel,
    run: Callable[[PreTrainedModel], torch.Tensor],
    *,
    optimizer: str = "adamw",
    quantize: str | None = None,
    others: Sequence[PreTrainedModel] = (),
) -> Footprint:
    """The footprint of a step that has gradients of earlier forests already, where `run` gives the loss of
    the next one.

    Model and `others`, which hold weights and nothing else, are fake (`build_fake`, `fake_copy`). With
    `quantize`, the linear layers are counted as quantized, and one of them at a time, the largest, as its
    weights again, which its products need.
    """
    return standing_footprint(
        model, activation_bytes(model, run), optimizer=optimizer, quantize=quantize, others=others
    )


def activation_bytes(model: PreTrainedModel, run: Callable[[PreTrainedModel], torch.Tensor]) -> int:
    """Most bytes that forward and backward pass hold above the weights and gradients that stand already; fake
    or real, the latter computed.
    """
    for parameter in _trainable(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return peak_bytes_of(lambda: run(model).backward())


def standing_footprint(
    model: PreTrainedModel,
    activations: int,
    *,
    optimizer: str = "adamw",
    quantize: str | None = None,
    others: Sequence[PreTrainedModel] = (),
) -> Footprint:
    """What stands throughout a step, beside what was counted of its passes; see `step_footprint`."""
    if quantize is not None:
        activations += max(_bytes([layer.weight]) for layer in _quantizable(model))
    return Footprint(
        weights=sum(weight_bytes(one, quantize) for one in [model, *others]),
        gradients=_bytes(_trainable(model)),
        optimizer=optimizer_bytes(_trainable(model), optimizer),
        activations=activations,
    )


def pass_loss(
    completions: Sequence[Completion], *, precision: str = "fp32", attention: AttentionChoice | None = None
) -> Callable[[PreTrainedModel], torch.Tensor]:
    """What `step_footprint` runs for this package: a loss of the completions' log-probs, all in one
    forest.
    """
    attention = attention or AttentionChoice(
        "forest", "nothing is computed, so nothing is compared", has_plain_head=True
    )

    def run(model: PreTrainedModel) -> torch.Tensor:
        (logps,) = PolicyModel(model, attention, precision=precision)([completions])
        return logps.sums().sum()

    return run


def pass_bytes(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    *,
    precision: str = "fp32",
) -> int:
    """Most bytes above its weights that a loaded model's forward and backward pass over the completions will
    hold, new gradients included.

    Gradients that stand already, of forests before, count nothing and get no copy. Nothing is computed, and
    the model stays as it is; what `Recomputation` was set to is taken over. On a CPU, linear layers are
    counted as torch's own.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fake_copy(model)
        return peak_bytes_of(
            lambda: pass_loss(completions, precision=precision, attention=attention)(fake).backward()
        )


def peak_bytes_of(run: Callable[[], Any]) -> int:
    """Most bytes that live at once of what `run` makes, on fake tensors or on real ones."""
    with LiveBytes() as live:
        run()
    return live.peak


def build_fake(config: PreTrainedConfig, dtype: torch.dtype, *, lora_r: int | None = None) -> PreTrainedModel:
    """A fake causal LM of this config in eval mode, to be called under a `FakeTensorMode`; with `lora_r`,
    frozen, with trainable float32 adapters at all linear layers but the head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        if lora_r is not None:
            _add_adapters(model, lora_r)
    return _off_meta(model).eval()


def policy_of(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """The fake model as this package trains it: forest attention, a mode of recomputation, and its own way
    through LoRA.
    """
    use_forest_attention(model)
    if any("lora_" in name for name, _ in model.named_parameters()):
        use_fast_lora(model)
    Recomputation(model).mode = mode
    return model


def fake_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model with fake tensors in place of its own, to be called under a `FakeTensorMode`."""
    mode = torch._guards.detect_fake_mode()
    assert mode is not None
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    use_torch_linear(fake)
    return fake


def weight_bytes(model: PreTrainedModel, quantize: str | None = None) -> int:
    """Bytes of all parameters, those of linear layers but the head as quantized."""
    whole = _bytes(model.parameters())
    if quantize is None:
        return whole
    if quantize not in QUANTIZED_BYTES:
        raise OptionError(f"quantize {quantize!r}: not known.\nUse one of {', '.join(QUANTIZED_BYTES)}.")
    weights = [layer.weight for layer in _quantizable(model)]
    return (
        whole - _bytes(weights) + round(QUANTIZED_BYTES[quantize] * sum(weight.numel() for weight in weights))
    )


def optimizer_bytes(parameters: Iterable[torch.nn.Parameter], optimizer: str) -> int:
    """Bytes of an optimizer's state for these parameters. Raises `OptionError` for one that is not known."""
    if optimizer not in OPTIMIZERS:
        raise OptionError(
            f"optimizer {optimizer!r}: its state is not known.\nUse one of {', '.join(OPTIMIZERS)}."
        )
    return sum(_state_bytes(parameter, optimizer) for parameter in parameters)


def _state_bytes(parameter: torch.nn.Parameter, optimizer: str) -> int:
    count = parameter.numel()
    match optimizer:
        case "adamw":
            return 2 * count * parameter.element_size()
        case "adamw-8bit":
            return 2 * (count + 4 * -(-count // 256)) if count >= LEAST_FOR_8BIT else 8 * count
        case "adafactor":
            return 4 * (
                count if parameter.ndim < 2 else count // parameter.shape[-1] + count // parameter.shape[-2]
            )
    return 0


def _trainable(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _quantizable(model: PreTrainedModel) -> Iterable[torch.nn.Linear]:
    """The linear layers whose weights are frozen, without the head."""
    head = model.get_output_embeddings()
    return (
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and module is not head and not module.weight.requires_grad
    )


def _add_adapters(model: PreTrainedModel, rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    inject_adapter_in_model(LoraConfig(r=rank, target_modules="all-linear"), model)
    cast_adapter_dtype(model, "default")


def _off_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The model with new tensors on the CPU, fake under a `FakeTensorMode`, in place of those on the meta
    device, which takes no autocast.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        torch.nn.Parameter(new, tensor.requires_grad)
                        if tensors is module._parameters
                        else new
                    )
                tensors[name] = made.get(id(tensor))
    return model


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
