"""Base weights in 4 or 8 bits, by bitsandbytes: their names, how they load, and their rounding.

    4bit    NF4 with its scales quantized once more (Sec. 3, arXiv:2305.14314); matrix products in the compute
            dtype
    8bit    weights in 8 bits a row, activations in 8 bits a token: LLM.int8() (arXiv:2208.07339) without its
            outliers in 16 bits, which depend on all tokens of a batch: a model with them is not causal

Embeddings, norms and the LM head keep the dtype of the model. The policy stays in eval mode, as everywhere:
in train mode bitsandbytes computes an 8-bit layer on a CPU in another way, and the policy would differ from
its reference.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import autocast_dtype
from dpo_cache.packages import check_bitsandbytes
from dpo_cache.types import QUANTIZATION_FIELDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Method of a quantized checkpoint -> the packages, besides transformers, that read it
PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "bitsandbytes_4bit": ("bitsandbytes", "accelerate"),
    "bitsandbytes_8bit": ("bitsandbytes", "accelerate"),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel", "accelerate"),
    "compressed-tensors": ("compressed-tensors",),
    "fp8": ("accelerate",),
    "torchao": ("torchao",),
    "quanto": ("optimum-quanto", "accelerate"),
    "hqq": ("hqq",),
    "aqlm": ("aqlm", "accelerate"),
    "auto-round": ("auto-round",),
    "eetq": ("kernels", "accelerate"),
    "mxfp4": ("kernels", "accelerate"),
    "quark": ("amd-quark",),
    "spqr": ("spqr-quant", "accelerate"),
    "vptq": ("vptq", "accelerate"),
}


def check_quantizable(config: PreTrainedConfig, location: str, name: str) -> None:
    """Raise `ModelError` where the checkpoint cannot be quantized to `name`, or a package is missing."""
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
    check_bitsandbytes(f"`quantize` {name}", ModelError)


def check_saved_quantization(config: PreTrainedConfig, location: str) -> None:
    """Raise `ModelError` where the package is missing that reads the checkpoint's quantized weights."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return
    method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
    method = str(getattr(method, "value", method))
    missing = [package for package in PACKAGES.get(method, ()) if not _is_installed(package)]
    if missing:
        raise ModelError(
            f"{location}: its weights are quantized ({method}), and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed.\n"
            f"Run `pip install {' '.join(missing)}`, or give the model that it was made from."
        )


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def loading_config(name: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The `quantization_config` for `from_pretrained`."""
    fields = {key: value for key, value in QUANTIZATION_FIELDS[name].items() if key != "quant_method"}
    if name == "4bit":
        fields["bnb_4bit_compute_dtype"] = compute_dtype
    return BitsAndBytesConfig(**fields)


def prepare_layers(model: PreTrainedModel) -> None:
    """Make freshly loaded bitsandbytes layers fit for training on any device."""
    for module in model.modules():
        # otherwise the layer repacks its weights for inference, in a form that has no backward pass
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether the weights are held in fewer bits than their dtype has."""
    return getattr(model, "hf_quantizer", None) is not None


def num_values(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter holds; 4-bit ones are packed, two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def rounding_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype whose rounding explains gaps between two ways to run the model; see `TOKEN_TOLERANCES`.

    An 8-bit layer rounds its inputs to 8 bits, so that a difference in the last bit of an input can become a
    hundredth: as coarse as bfloat16, in a model of any dtype. A 4-bit layer computes in the compute dtype.
    Under mixed precision it is the dtype of the products.
    """
    if (mixed := autocast_dtype(model.device)) is not None:
        return mixed
    is_int8 = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    return torch.bfloat16 if is_int8 else model.dtype


def rounding_dtype_of(identity: dict[str, Any]) -> str:
    """The same, from the identity of a reference."""
    quantization = identity.get("quantization")
    is_int8 = isinstance(quantization, dict) and bool(quantization.get("load_in_8bit"))
    return "bfloat16" if is_int8 else identity["dtype"]
