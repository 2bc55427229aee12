"""Changes to modules of other libraries, which are undone in reverse order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Patches:
    """Replaced `forward` methods and registered hooks, until `undo`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
        """Let `module(*args)` call `function(module, forward, *args)` with its present `forward`."""
        is_replaced = "forward" in module.__dict__
        restore = partial(setattr, module, "forward", module.forward)
        self._undo.append(restore if is_replaced else partial(delattr, module, "forward"))
        module.forward = partial(function, module, module.forward)  # type: ignore[method-assign]

    def before_forward(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Let `hook(module, args)` return the module's positional arguments."""
        self._undo.append(module.register_forward_pre_hook(hook).remove)

    def undo(self) -> None:
        """Leave every module as it was before the first change."""
        while self._undo:
            self._undo.pop()()
