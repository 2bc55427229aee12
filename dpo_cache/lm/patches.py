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
        """Let `module(*args)` call `function(module, forward, *args)`, where `forward` is what it called
        before.
        """
        before = module.__dict__.get("forward")
        module.forward = partial(function, module, module.forward)  # type: ignore[method-assign]
        self._undo.append(partial(_restore_forward, module, before))

    def before_forward(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Let `hook(module, args)` give the module's positional arguments."""
        self._undo.append(module.register_forward_pre_hook(hook).remove)

    def undo(self) -> None:
        """Leave every module as it was before the first change."""
        while self._undo:
            self._undo.pop()()


def _restore_forward(module: torch.nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before  # type: ignore[method-assign]
