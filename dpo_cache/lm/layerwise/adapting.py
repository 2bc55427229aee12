"""Find the object that streams a model's weights; importing this module takes no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from dpo_cache.lm.device import STREAMED

if TYPE_CHECKING:
    import torch

    from dpo_cache.lm.layerwise.streamed import StreamedWeights


def streamed_weights_of(model: torch.nn.Module) -> StreamedWeights | None:
    """The object that streams the weights of a model; None if all weights are on the device."""
    found: StreamedWeights | None = getattr(type(model), STREAMED, None)
    return found


@contextmanager
def adapting(model: torch.nn.Module) -> Iterator[None]:
    """In this block, PEFT puts an adapter into the model, whose weights may be streamed."""
    weights = streamed_weights_of(model)
    with nullcontext() if weights is None else weights.adapting():
        yield
