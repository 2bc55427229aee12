"""The activations of DPO with a live reference, as TRL 1.16 runs it, counted with the same settings.

In full fine-tuning the reference is a second copy of the weights; for adapters it is the same model with the
adapters off. The backward pass recomputes every layer's activations.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.planning.few_layers import over_layers
from dpo_cache.planning.footprint import build_fake, phase_peaks_of
from dpo_cache.planning.padded_step import padded_loss, prepare
from dpo_cache.planning.parts import Method
from dpo_cache.types import Completion


def live_reference_peak(
    config: PreTrainedConfig, method: Method, completions: Sequence[Completion], *, alike: bool
) -> int:
    """Peak bytes above weights and gradients. The completions of the micro-batch are all chosen ones, then
    all rejected ones. Rows are padded to the longest.
    """
    half = len(completions) // 2
    pairs = zip(completions[:half], completions[half:], strict=True)
    alternating = [side for pair in pairs for side in pair]
    has_second = method.lora_r is None

    def peaks(one: PreTrainedConfig) -> list[int]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build_fake(one, method.dtype, lora_r=method.lora_r, lora_targets=method.lora_targets)
            others = [build_fake(one, method.dtype)] if has_second else []
            loss = padded_loss(
                alternating,
                autocast=method.precision != "fp32",
                reference=others[0] if has_second else None,
                with_adapters=not has_second,
            )
            return phase_peaks_of(prepare(model, checkpointing=True), loss, others=others)

    return over_layers(peaks, config, alike=alike)
