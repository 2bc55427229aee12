"""The device memory while a reference scores completions, counted on fake tensors.

The decoder's peak grows with a chunk's tokens and, through the keys and values of the open path, with the
layers: it is counted for two small chunks, and for two and three layers. The head's is counted for the chunk
itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.forest.kernels import SEGMENTS
from dpo_cache.lm.forest.stream import Stream
from dpo_cache.lm.scoring import ChunkRunner
from dpo_cache.planning.few_layers import with_layers
from dpo_cache.planning.footprint import build_fake, counted_attention
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.planning.parts import Parts
from dpo_cache.planning.placed import RING_SLOTS, ModelBytes
from dpo_cache.types import Completion

SMALL_CHUNKS = 512, 1024
COUNTED_LAYERS = 2


class ScoringCounts:
    """The memory of scoring these completions with one model, whatever the size of the chunks."""

    def __init__(
        self,
        config: PreTrainedConfig,
        sizes: ModelBytes,
        completions: Sequence[Completion],
        dtype: torch.dtype,
        device_type: str = "cuda",
    ):
        self._config, self._sizes, self._dtype = config, sizes, dtype
        self._completions, self._device_type = completions, device_type
        self._precision = "fp32" if dtype == torch.float32 else "bf16"
        small, large = SMALL_CHUNKS
        self._can_cut = sizes.alike and sizes.num_layers > COUNTED_LAYERS
        few = with_layers(config, COUNTED_LAYERS) if self._can_cut else config
        at_small, at_large = self._decoder_peak(few, small), self._decoder_peak(few, large)
        self._at_large, self._per_token = at_large, max(0.0, (at_large - at_small) / (large - small))
        self._per_layer = 0  # keys and values of the open path
        if self._can_cut:
            one_more = with_layers(config, COUNTED_LAYERS + 1)
            self._per_layer = self._decoder_peak(one_more, small) - at_small

    def resident(self, budget_tokens: int) -> Parts:
        """The device's memory while chunks of so many tokens run through all layers."""
        paths = self._per_layer * (self._sizes.num_layers - COUNTED_LAYERS) if self._can_cut else 0
        ahead = self._per_layer * COUNTED_LAYERS  # keys and values of the counted layers
        return Parts(
            weights=self._sizes.weights,
            buffers=self._sizes.dequantized,
            activations=paths + max(self._few_layers(budget_tokens), self._head_peak(budget_tokens) + ahead),
        )

    def streamed(self, budget_tokens: int) -> Parts:
        """The device's memory while chunks pass one layer at a time, whose weights are on the device only
        then.
        """
        return Parts(
            weights=self._sizes.rest,
            buffers=self._sizes.dequantized + RING_SLOTS * self._sizes.largest_layer + self._sizes.head_copy,
            activations=max(self._few_layers(budget_tokens), self._head_peak(budget_tokens)),
        )

    def _few_layers(self, budget_tokens: int) -> int:
        return round(self._at_large + self._per_token * (budget_tokens - SMALL_CHUNKS[1]))

    @torch.no_grad()
    def _decoder_peak(self, config: PreTrainedConfig, tokens: int) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(self._device_type):
            model = build_fake(config, self._dtype)
            use_forest_attention(model)
            stream = Stream(self._completions)
            with LiveBytes() as live:
                runner = ChunkRunner(model, stream, counted_attention(model, self._precision).kernel)
                chunk = next(stream.chunks(lambda: tokens))
                runner.decoder(**runner.arguments(chunk))
            return live.peak

    @torch.no_grad()
    def _head_peak(self, tokens: int) -> int:
        """The head's peak, with the hidden states of the chunk."""
        config = self._config.get_text_config()
        with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(self._device_type):
            model = build_fake(
                with_layers(self._config, 1) if self._sizes.alike else self._config, self._dtype
            )
            stream = Stream(self._completions)
            with LiveBytes() as live:
                chunk = next(stream.chunks(lambda: tokens))
                hidden_CD = torch.empty(len(chunk), config.hidden_size, dtype=self._dtype)
                ChunkRunner(model, stream, SEGMENTS).logps(chunk, hidden_CD)
            return live.peak
