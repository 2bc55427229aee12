"""Gradients that are used as soon as they are there, and freed: most of them never exist at the same time.

The last backward pass of a step finishes one parameter's gradient after another. Each is used for the
parameter's update at once and dropped. Earlier backward passes of the step leave theirs to be added to, so a
step of several forests still holds all gradients until its last one begins; a step of one forest holds a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from dpo_cache.training.optim.updates import Updater


class OptimizerInBackward:
    """Runs the last backward pass of each step so that parameters are updated within it.

    A parameter of several places in the model is updated once, when the gradients of all of them have been
    added up.
    """

    def __init__(self, updater: Updater):
        self._updater = updater
        self._norms: dict[
            int, torch.Tensor
        ] = {}  # by place in the model's order, of the gradients that are used and gone
        self._is_last = False
        for place, parameter in enumerate(updater.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._take, place))

    @property
    def has_begun(self) -> bool:
        """Whether weights of this step are updated: then it cannot be taken again."""
        return bool(self._norms)

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the backward pass after which all gradients of the step are whole."""
        self._is_last = True
        try:
            yield
        finally:
            self._is_last = False
        # what only earlier passes of the step gave a gradient
        for place, parameter in enumerate(self._updater.parameters):
            if parameter.grad is not None:
                self._use(place, parameter)

    def end_step(self) -> torch.Tensor:
        """Norm of the step's gradient, as `clip_grad_norm_` gives it; the next step may begin."""
        norms = [self._norms[place] for place in sorted(self._norms)]
        self._norms = {}
        # nothing was updated
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(torch.nan)

    def _take(self, place: int, parameter: torch.Tensor) -> None:
        if self._is_last:
            self._use(place, parameter)

    @torch.no_grad()
    def _use(self, place: int, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None
        self._norms[place] = torch.linalg.vector_norm(parameter.grad)
        self._updater.update(parameter)
        parameter.grad = None
