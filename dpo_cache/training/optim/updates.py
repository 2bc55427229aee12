"""Updates of parameters, all at once or one as soon as its gradient is there, and their state as plain
tensors.

A bfloat16 parameter is updated in float32: the optimizer works on a stand-in, which holds the parameter's
value and gradient for the time of its own update and nothing in between. The result is rounded back as
`rounding.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cache.errors import TrainingError
from dpo_cache.training.optim.rounding import join_float, split_float, stochastic_bf16

# from leaves and how many dimensions they stand for
Build = Callable[[Sequence[torch.nn.Parameter], Sequence[int]], torch.optim.Optimizer]

REST, UPDATES = "rest", "updates"  # what a bfloat16 parameter's state holds besides the optimizer's


@dataclass
class _Slot:
    """A parameter, what the optimizer works on in its place, and where that stands in the optimizer's
    groups.
    """

    name: str
    parameter: torch.nn.Parameter
    leaf: torch.nn.Parameter
    group: int = 0
    num_updates: int = (
        0  # of a bfloat16 parameter: with its place, what its stochastic rounding is drawn from
    )
    rest: torch.Tensor | None = None  # int16, under compensated rounding

    @property
    def stands_in(self) -> bool:
        return self.leaf is not self.parameter


class Updater:
    """An optimizer, with the interface of torch's as far as a training loop needs it.

    Updating the parameters one by one, in any order, gives bit for bit what updating them at once gives.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], build: Build, *, rounding: str, seed: int
    ):
        self.rounding, self.seed = rounding, seed
        self._slots = [_Slot(name, parameter, _leaf(parameter)) for name, parameter in parameters]
        self._place = {slot.parameter: place for place, slot in enumerate(self._slots)}
        self._base = build([slot.leaf for slot in self._slots], [slot.parameter.ndim for slot in self._slots])
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
        """What is trained, in the model's order."""
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
        """Update one parameter by its gradient, which is left as it is."""
        slot = self._slots[self._place[parameter]]
        with self._alone(slot), self._filled(slot):
            self._base.step()
            if slot.stands_in:
                slot.num_updates += 1
                self._write_back(slot)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        assert set_to_none, "a gradient of zeros costs memory and makes an update"
        for slot in self._slots:
            slot.parameter.grad = None

    # -- state -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state, `<parameter>/<state>` each, that `restore` takes. A Python int is an int64 without
        dimensions.
        """
        found: dict[str, Any] = {}
        for slot in self._slots:
            # a constant
            state = {
                key: value
                for key, value in self._base.state.get(slot.leaf, {}).items()
                if not key.startswith("qmap")
            }
            if slot.stands_in and slot.num_updates:
                state |= {UPDATES: slot.num_updates} | ({REST: slot.rest} if slot.rest is not None else {})
            found |= {f"{slot.name}/{key}": _as_tensor(value) for key, value in state.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up the state of another one of the same kind: what follows equals, bit for bit, what would
        have followed there.

        Raises `TrainingError` where the state is of other parameters.
        """
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            by_name.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = tensor
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
        with self._alone(slot), self._filled(slot):
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
    def _alone(self, slot: _Slot) -> Iterator[None]:
        """The optimizer with nothing but this parameter in it."""
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
        leaf.data = (
            parameter.detach().float() if slot.rest is None else join_float(parameter.detach(), slot.rest)
        )
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
