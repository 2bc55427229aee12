"""Base weights in 4 or 8 bits, by bitsandbytes: how they are named, loaded, and what rounding they bring.

    4bit    NF4 with its scales quantized once more (Sec. 3, arXiv:2305.14314); matrix products in the compute
            dtype
    8bit    weights in 8 bits a row, activations in 8 bits a token: LLM.int8() (arXiv:2208.07339) without its
            outliers in 16 bits, which are chosen by looking at all tokens of a batch: a model with them is
            not causal

Embeddings, norms and the LM head keep the dtype of the model. The policy stays in eval mode, as everywhere:
in train mode bitsandbytes takes another way through an 8-bit layer on a CPU, and the policy would not be its
reference.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from dpo_cache.errors import ModelError
from dpo_cache.types import QUANTIZATION_FIELDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_quantizable(config: PreTrainedConfig, location: str, name: str) -> None:
    """Raise `ModelError` where the checkpoint cannot be quantized to `name`, or nothing is there to do it."""
    if name == "none":
        return
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
        raise ModelError(
            f"{location}: its weights were saved quantized ({getattr(method, 'value', method)}), and "
            f"`quantize` {name} would quantize them again.\n"
            "Leave `quantize` out: the checkpoint is loaded as it is. Or give the model that it was made "
            "from."
        )
    missing = [
        package for package in ("bitsandbytes", "accelerate") if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ModelError(
            f"`quantize` {name} needs {' and '.join(missing)}, which is not installed.\n"
            "Run `pip install 'dpo-cache[quantize]'`."
        )


def loading_config(name: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes as `quantization_config`."""
    fields = {key: value for key, value in QUANTIZATION_FIELDS[name].items() if key != "quant_method"}
    return BitsAndBytesConfig(
        **fields, **({"bnb_4bit_compute_dtype": compute_dtype} if name == "4bit" else {})
    )


def prepare_layers(model: PreTrainedModel) -> None:
    """Make freshly loaded bitsandbytes layers fit for training on any device."""
    for module in model.modules():
        # it would repack the weights for inference, in a form that has no backward pass
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the weights are held in fewer bits than their dtype has."""
    return getattr(model, "hf_quantizer", None) is not None


def num_values(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter holds; 4-bit ones are packed, two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def rounding_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype whose rounding explains gaps between two ways to run the model; see `TOKEN_TOLERANCES`.

    An 8-bit layer rounds its inputs to 8 bits, so that a difference in the last bit before it can become one
    of a
    hundredth: as coarse as bfloat16, whatever dtype surrounds it. A 4-bit layer computes in the compute
    dtype.
    """
    return torch.bfloat16 if any(_is_int8(module) for module in model.modules()) else model.dtype


def rounding_dtype_of(identity: dict[str, Any]) -> str:
    """The same, of a reference that is known by its identity alone."""
    quantization = identity.get("quantization")
    is_int8 = isinstance(quantization, dict) and bool(quantization.get("load_in_8bit"))
    return "bfloat16" if is_int8 else identity["dtype"]


def _is_int8(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt"
