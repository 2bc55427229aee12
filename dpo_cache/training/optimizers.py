"""What turns gradients into updates."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def make_optimizer(model: PreTrainedModel, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; weight decay spares biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=model.device.type in ("cpu", "cuda"))
