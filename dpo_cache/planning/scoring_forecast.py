"""Time and memory of scoring, for the forecast of a dry run, counted from the model's config as in `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.lm.budget import SIZES as CHUNK_SIZES
from dpo_cache.lm.free_memory import free_bytes
from dpo_cache.planning.footprint import build_fake
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model
from dpo_cache.planning.scoring import ScoringCounts
from dpo_cache.planning.timing import EFFICIENCY, count_operations, forward_operations, measure_tflops
from dpo_cache.planning.ways import PROCESS_BYTES, device_need
from dpo_cache.types import Completion


@dataclass(frozen=True)
class Work:
    """The completions to score, as numbers of tokens and a sample."""

    num_tokens: int  # tokens of the forest: every shared prefix once
    num_targets: int  # tokens of answers
    mean_context: float  # mean number of tokens that a token attends to
    sample: Sequence[Completion]  # some completions, with the longest one: enough for a large chunk


def scoring_seconds(
    config: PreTrainedConfig, method: Method, work: Work, device: torch.device, *, num_workers: int = 1
) -> float:
    """Seconds of the forward passes, from the speed of matrix products that is measured on the device.

    Workers on a CPU share its cores.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = count_operations(build_fake(config, method.dtype))
    operations = forward_operations(found, work.num_tokens, work.num_targets, work.mean_context)
    at_once = num_workers if device.type != "cpu" else 1
    return operations / (measure_tflops(device) * 1e12 * EFFICIENCY * at_once)


def scoring_bytes(
    config: PreTrainedConfig,
    method: Method,
    work: Work,
    device_type: str,
    *,
    budget_tokens: int | None,
    is_streamed: bool,
    free: int | None,
) -> int:
    """Peak bytes of the device during scoring, with the largest chunks that fit, as the search finds them.

    On a CPU they are those of the process.
    """
    counts = ScoringCounts(config, measure_model(config, method), work.sample, method.dtype, device_type)
    budgets = (budget_tokens,) if budget_tokens else tuple(reversed(CHUNK_SIZES[device_type]))
    need = 0
    for tokens in budgets:
        parts = counts.streamed(tokens) if is_streamed else counts.resident(tokens)
        need = device_need(parts) if device_type == "cuda" else parts.total + PROCESS_BYTES
        if free is None or need <= free:
            break
    return need


def free_device_bytes(device: torch.device) -> int | None:
    """The device's free memory; None for a device that this machine does not have."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return free_bytes(device)


def scoring_method(dtype: torch.dtype, quantize: str) -> Method:
    """The method under which the reference's memory is counted: nothing is trained."""
    precision = "bf16" if dtype.itemsize == 2 else "fp32"
    return Method(precision, optimizer="none", quantize=None if quantize == "none" else quantize)
