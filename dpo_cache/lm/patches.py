"""Changes to modules of other libraries, which are undone in reverse order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


class Patch(partial[Any]):
    """A replaced `forward`: `partial(function, module, forward)`."""

    __slots__ = ()


class Patches:
    """Replaced `forward` methods and registered hooks, until `undo`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
        """Let `module(*args)` call `function(module, forward, *args)` with its present `forward`."""
        is_replaced = "forward" in module.__dict__
        restore = partial(setattr, module, "forward", module.forward)
        self._undo.append(restore if is_replaced else partial(delattr, module, "forward"))
        module.forward = Patch(function, module, module.forward)  # type: ignore[method-assign]

    def before_forward(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Let `hook(module, args)` return the module's positional arguments."""
        self._undo.append(module.register_forward_pre_hook(hook).remove)

    def undo(self) -> None:
        """Leave every module as it was before the first change."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def without_patches(model: torch.nn.Module) -> Iterator[None]:
    """The model with each `forward` that `Patches` replaced as it was; hooks stay."""
    replaced = [(module, module.__dict__["forward"]) for module in model.modules() if is_patched(module)]
    for module, forward in replaced:
        while isinstance(forward, Patch):
            forward = forward.args[1]
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward


def is_patched(module: torch.nn.Module) -> bool:
    """Return whether its `forward` was replaced."""
    return isinstance(module.__dict__.get("forward"), Patch)
