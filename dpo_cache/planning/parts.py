"""The parts of a peak of memory, and the ways to train that they are counted for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LORA_RANK = 16  # of an adapter whose rank is not given


@dataclass(frozen=True)
class Parts:
    """Bytes of one memory, the device's or the host's, by their use at the peak.

    weights      parameters, quantized ones included; copies of them that stay
    gradients    those that exist between two passes
    optimizer    its state
    inputs       layer inputs that wait for the backward pass
    buffers      rings through which layers' weights and gradients pass, and what a device needs to dequantize
    activations  the peak of a forward and backward pass above the others
    update       what an update needs for a moment, when there are no inputs, buffers and activations
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
        """The peak: of a pass, or of the update."""
        standing = self.weights + self.gradients + self.optimizer
        return standing + max(self.inputs + self.buffers + self.activations, self.update)


@dataclass(frozen=True)
class Method:
    """What is trained and in which numbers; the names of `dpo-cache train`, without `auto`."""

    precision: str = "fp32"
    optimizer: str = "adamw"
    rounding: str = "stochastic"
    lora_r: int | None = None
    lora_targets: str = "all-linear"
    quantize: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as `train` loads them."""
        is_bf16 = self.precision == "bf16" or (self.precision == "bf16-mixed" and self.lora_r is not None)
        return torch.bfloat16 if is_bf16 else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matrix products, and of the hidden states between layers under `bf16`."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def __str__(self) -> str:
        bits = {"4bit": " on 4 bits", "8bit": " on 8 bits"}.get(self.quantize or "", "")
        return "full" if self.lora_r is None else f"LoRA r={self.lora_r}{bits}"
