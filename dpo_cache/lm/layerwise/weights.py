"""Where the weights of a decoder's layers are while other layers run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class LayerWeights(Protocol):
    """The object that copies a layer's weights to the device."""

    def use(self, index: int, *, then: int | None = None) -> AbstractContextManager[None]:
        """While open, layer `index` has its weights on the device; those of `then` are fetched meanwhile."""
        ...

    def use_bottom(self) -> AbstractContextManager[None]:
        """While open, what runs before the first layer has its weights on the device."""
        ...

    def use_top(self) -> AbstractContextManager[None]:
        """While open, what runs after the last layer has its weights on the device, the LM head's too."""
        ...


class ResidentWeights:
    """All weights are on the device."""

    def use(self, index: int, *, then: int | None = None) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def use_bottom(self) -> AbstractContextManager[None]:
        return nullcontext()

    def use_top(self) -> AbstractContextManager[None]:
        return nullcontext()
