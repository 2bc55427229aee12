"""The parts of a memory peak, and the ways to train for which they are counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LORA_RANK = 16  # assumed for an adapter whose rank is not given


@dataclass(frozen=True)
class Parts:
    """Bytes of one memory, the device's or the host's, by use at the peak.

    weights      parameters, quantized ones included, and their permanent copies
    gradients    gradients that exist between two passes
    optimizer    the optimizer's state
    inputs       layer inputs that wait for the backward pass
    buffers      ring buffers for layers' weights and gradients, and the memory to dequantize a weight
    activations  the peak of a forward and backward pass above the others
    update       temporary values of the update, when there are no inputs, buffers and activations
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    inputs: int = 0
    buffers: int = 0
    activations: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """The larger of two peaks: that of a pass, and that of the update."""
        standing = self.weights + self.gradients + self.optimizer
        return standing + max(self.inputs + self.buffers + self.activations, self.update)


@dataclass(frozen=True)
class Method:
    """The trained weights and their dtypes, in the names of `dpo-cache train`, without `auto`."""

    precision: str = "fp32"
    optimizer: str = "adamw"
    rounding: str = "stochastic"
    lora_r: int | None = None
    lora_targets: str = "all-linear"
    quantize: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, as `train` loads them."""
        is_bf16 = self.precision == "bf16" or (self.precision == "bf16-mixed" and self.lora_r is not None)
        return torch.bfloat16 if is_bf16 else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products, and of the hidden states between layers under `bf16`."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def __str__(self) -> str:
        bits = {"4bit": " on 4 bits", "8bit": " on 8 bits"}.get(self.quantize or "", "")
        return "full" if self.lora_r is None else f"LoRA r={self.lora_r}{bits}"
