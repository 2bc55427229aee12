"""Updates of parameters, all at once or each as soon as it has its gradient, and the state as plain tensors.

A bfloat16 parameter is updated in float32: the optimizer works on a stand-in, which has the parameter's value
and gradient during its update, and is empty in between. The result is rounded as `rounding.py` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cache.errors import TrainingError
from dpo_cache.training.optim.rounding import join_float, split_float, stochastic_bf16

# makes an optimizer of leaves, from them and the names of their parameters
Build = Callable[[Sequence[torch.nn.Parameter], Sequence[str]], torch.optim.Optimizer]

REST, UPDATES = "rest", "updates"  # what a bfloat16 parameter's state holds besides the optimizer's


@dataclass
class _Slot:
    """A parameter, and the leaf that the optimizer updates: the parameter, or its float32 stand-in."""

    name: str
    parameter: torch.nn.Parameter
    leaf: torch.nn.Parameter
    group: int = 0  # the leaf's among the optimizer's groups
    num_updates: int = 0  # of a bfloat16 parameter: with its place, the seed of its stochastic rounding
    rest: torch.Tensor | None = None  # int16, under compensated rounding

    @property
    def stands_in(self) -> bool:
        return self.leaf is not self.parameter


class Updater:
    """An optimizer, with the part of torch's interface that a training loop needs.

    Updating the parameters one by one, in any order, gives the same bits as updating them at once.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], build: Build, *, rounding: str, seed: int
    ):
        self.rounding, self.seed = rounding, seed
        self._slots = [_Slot(name, parameter, _leaf(parameter)) for name, parameter in parameters]
        self._place = {slot.parameter: place for place, slot in enumerate(self._slots)}
        self._base = build([slot.leaf for slot in self._slots], [slot.name for slot in self._slots])
        group_of = {
            leaf: place for place, group in enumerate(self._base.param_groups) for leaf in group["params"]
        }
        for slot in self._slots:
            slot.group = group_of[slot.leaf]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, to set `lr` in."""
        return self._base.param_groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in the model's order."""
        return [slot.parameter for slot in self._slots]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        if not any(slot.stands_in for slot in self._slots):
            self._base.step()
            return
        for slot in self._slots:
            if slot.parameter.grad is not None:
                self.update(slot.parameter)

    @torch.no_grad()
    def update(self, parameter: torch.nn.Parameter) -> None:
        """Update one parameter by its gradient, which is kept."""
        slot = self._slots[self._place[parameter]]
        with self._only(slot), self._filled(slot):
            self._base.step()
            if slot.stands_in:
                slot.num_updates += 1
                self._write_back(slot)

    def zero_grad(self) -> None:
        """Drop all gradients: a gradient of zeros would cost memory and make an update."""
        for slot in self._slots:
            slot.parameter.grad = None

    # -- state -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state, `<parameter>/<state>` each, that `restore` takes. A Python int is an int64 without
        dimensions.
        """
        found: dict[str, torch.Tensor] = {}
        for slot in self._slots:
            state = dict(self._base.state.get(slot.leaf, {}))
            if slot.stands_in and slot.num_updates:
                state |= {UPDATES: slot.num_updates, REST: slot.rest}
            found |= {
                f"{slot.name}/{key}": _as_tensor(value)
                for key, value in state.items()
                if value is not None and not key.startswith("qmap")  # which is a constant
            }
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from the state of an updater of the same kind: later updates equal its own, bit for bit.

        Raises `TrainingError` if the state is of other parameters.
        """
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            by_name.setdefault(name, {})[key] = tensor
        if unknown := by_name.keys() - {slot.name for slot in self._slots}:
            raise TrainingError(
                f"the saved optimizer has state for {len(unknown)} weights that are not trained now, "
                f"first {min(unknown)}.\n"
                "Resume with the options that the run was started with."
            )
        for slot in self._slots:
            if saved := by_name.get(slot.name):
                self._restore(slot, dict(saved))

    def _restore(self, slot: _Slot, saved: dict[str, torch.Tensor]) -> None:
        if slot.stands_in:
            slot.num_updates = int(saved.pop(UPDATES))
            slot.rest = saved.pop(REST).to(slot.parameter.device) if REST in saved else None
        with self._only(slot), self._filled(slot):
            # bitsandbytes: makes buffers of its own, some of them paged
            if hasattr(self._base, "init_state"):
                self._base.init_state(self._base.param_groups[0], slot.leaf, 0, 0)
                state = self._base.state[slot.leaf]
                for key, value in saved.items():
                    state[key] = (
                        state[key].copy_(value)
                        if isinstance(state[key], torch.Tensor)
                        else _from_tensor(value)
                    )
            else:
                fused = bool(self._base.defaults.get("fused"))
                # AdamW counts its steps on the CPU unless it is fused
                self._base.state[slot.leaf] = {
                    key: _from_tensor(
                        value if key == "step" and not fused else value.to(slot.parameter.device)
                    )
                    for key, value in saved.items()
                }

    # -- one parameter ---------------------------------------------------------------------------------

    @contextmanager
    def _only(self, slot: _Slot) -> Iterator[None]:
        """The optimizer with only this parameter in it."""
        groups = self._base.param_groups
        self._base.param_groups = [{**groups[slot.group], "params": [slot.leaf]}]
        try:
            yield
        finally:
            self._base.param_groups = groups

    @contextmanager
    def _filled(self, slot: _Slot) -> Iterator[None]:
        """A stand-in with its parameter's value and gradient; emptied again at the end."""
        if not slot.stands_in:
            yield
            return
        parameter, leaf = slot.parameter, slot.leaf
        value = parameter.detach()
        leaf.data = value.float() if slot.rest is None else join_float(value, slot.rest)
        leaf.grad = None if parameter.grad is None else parameter.grad.float()
        try:
            yield
        finally:
            leaf.grad = None
            leaf.data = _nothing(parameter)

    def _write_back(self, slot: _Slot) -> None:
        values = slot.leaf.detach()
        if self.rounding == "compensated":
            rounded, slot.rest = split_float(values)
        elif self.rounding == "stochastic":
            rounded = stochastic_bf16(values, self.seed, slot.num_updates, self._place[slot.parameter])
        else:
            rounded = values.bfloat16()
        slot.parameter.copy_(rounded)


def _leaf(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(_nothing(parameter)) if parameter.dtype == torch.bfloat16 else parameter


def _nothing(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=parameter.device)


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(value: torch.Tensor) -> Any:
    return value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else value
