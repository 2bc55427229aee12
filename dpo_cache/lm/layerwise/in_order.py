"""Streamed weights by the order in which the decoder calls its layers, instead of that of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from dpo_cache.lm.layerwise.streamed import StreamedWeights


class InOrder:
    """`LayerWeights` whose index is a call's; `slots` has the place of each call's layer in the weights."""

    def __init__(self, weights: StreamedWeights, slots: Sequence[int]):
        self._weights, self._slots = weights, slots

    def use(self, index: int, *, then: int | None = None) -> AbstractContextManager[None]:
        return self._weights.use(self._slots[index], then=None if then is None else self._slots[then])

    def use_bottom(self) -> AbstractContextManager[None]:
        return self._weights.use_bottom()

    def use_top(self) -> AbstractContextManager[None]:
        return self._weights.use_top()

    def leaves(self, key: int | str) -> dict[str, torch.Tensor]:
        """The copies of the parameters that need a gradient: of a call's layer, of "bottom" or of "top"."""
        return self._weights.leaves(self._slots[key] if isinstance(key, int) else key)

    def refresh(self, key: int | str | None = None) -> None:
        """The parameters of a call's layer, of an end, or all have changed."""
        self._weights.refresh(self._slots[key] if isinstance(key, int) else key)
