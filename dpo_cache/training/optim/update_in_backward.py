"""Updates within the backward pass, which free each gradient at once: few gradients exist at the same time.

The last backward pass of a step completes one parameter's gradient after another. Each gradient updates its
parameter and is then freed. Earlier backward passes of the step accumulate gradients, so a step of several
forests holds all gradients until its last backward pass begins; a step of one forest holds a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo_cache.training.optim.clipping import norm_of, norm_over
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.ranks import Ranks


class OptimizerInBackward:
    """Updates the parameters within the last backward pass of each step.

    A parameter that the model uses in several places is updated once, with the sum of their gradients. With
    `is_hooked` False nothing is updated until `take` is called. `ranks` may have shards of the parameters.
    """

    def __init__(self, updater: Updater, *, is_hooked: bool = True, ranks: Ranks | None = None):
        self._updater, self._ranks = updater, ranks
        self._norms: dict[int, torch.Tensor] = {}  # norms of freed gradients, by position in the model
        self._is_last = False
        self._places = {parameter: place for place, parameter in enumerate(updater.parameters)}
        if is_hooked:
            for parameter in updater.parameters:
                parameter.register_post_accumulate_grad_hook(self._take)

    @torch.no_grad()
    def take(self, gradients: dict[torch.nn.Parameter, torch.Tensor]) -> None:
        """Update parameters whose gradients are complete, and drop the gradients."""
        for parameter, gradient in gradients.items():
            self._norms[self._places[parameter]] = norm_of(gradient)
        self._updater.update(*gradients, gradients=gradients)
        for parameter in gradients:
            parameter.grad = None

    @property
    def has_begun(self) -> bool:
        """Return whether weights are updated in this step; then it cannot be repeated."""
        return bool(self._norms)

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Wrap the backward pass that completes the gradients of the step."""
        self._is_last = True
        try:
            yield
        finally:
            self._is_last = False
        # parameters that have gradients only from earlier passes
        for parameter in self._updater.parameters:
            if parameter.grad is not None:
                self.take({parameter: parameter.grad})

    def end_step(self) -> torch.Tensor:
        """Return the norm of the step's gradient, as `clip_grad_norm_` does, and prepare the next step."""
        norms = [self._norms[place].cpu() for place in sorted(self._norms)]
        self._norms = {}
        # nothing was updated
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(torch.nan)
        return norm_over(self._ranks, norm)

    def _take(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None
        if self._is_last:
            self.take({parameter: parameter.grad})
