"""The counted memory peak of passes that run one forest after another through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.planning.few_layers import over_layers
from dpo_cache.planning.footprint import build_fake, pass_loss, phase_peaks_of, policy_of
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.planning.parts import Method
from dpo_cache.types import Completion

SIMILAR = 0.9  # from this share of the first forest's tokens on, the end of the first is no peak


def passes_peak(
    config: PreTrainedConfig,
    method: Method,
    forests: Sequence[Sequence[Completion]],
    *,
    recomputation: str,
    alike: bool,
    gradients: int,
    device_type: str = "cuda",
) -> int:
    """Peak bytes above the weights of a step over these forests, largest first, until its update.

    The first forest makes the gradients, which take `gradients` bytes; the second runs while they exist.
    `alike`: all layers hold the same tensors.
    """
    first, second = forests[0], forests[1] if len(forests) > 1 else []

    def peaks(completions: Sequence[Completion], one: PreTrainedConfig, *, has_gradients: bool) -> list[int]:
        with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(device_type):
            model = build_fake(one, method.dtype, lora_r=method.lora_r, lora_targets=method.lora_targets)
            model, run = policy_of(model, recomputation), pass_loss(completions, precision=method.precision)
            if has_gradients:
                return phase_peaks_of(model, run)
            with LiveBytes() as live:
                run(model).backward()
            return [live.peak]

    def above(completions: Sequence[Completion]) -> int:
        return over_layers(partial(peaks, completions, has_gradients=True), config, alike=alike)

    sizes = [count_forest_tokens(forest) for forest in (first, second)]
    if sizes[1] < SIMILAR * sizes[0]:
        # new gradients grow with the layers in another way than activations do, so all layers are counted
        (made,) = peaks(first, config, has_gradients=False)
    else:
        made = above(first) if sizes[1] < sizes[0] else 0
    return max(made, gradients + above(second)) if second else made
