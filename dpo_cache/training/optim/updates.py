"""Updates of parameters, all at once or each as soon as it has its gradient, and the state as plain tensors.

A parameter and its state are stored on the parameter's device, their home. There are three ways to update it:

    directly    a float32 parameter on its own device, by an optimizer of torch
    in slices   by an optimizer that updates each value, or each block of 256, independently. It works on a
                stand-in, which has the float32 values, gradient and state of one slice during its update, and
                is empty in between. Slices of a parameter on the host may pass through a device.
    whole       by other optimizers, on a stand-in for a whole bfloat16 parameter

Values that are kept in bfloat16 are rounded as `rounding.py` describes: a parameter as `rounding` demands,
and state always stochastically, since 0.999 times a bfloat16 moment, rounded to the nearest, is the same
moment. State with its rest would take as much memory as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from dpo_cache.errors import TrainingError
from dpo_cache.training.optim.rounding import join_float, split_float, stochastic_bf16
from dpo_cache.training.optim.slots import GRADIENT, REST, TABLE, VALUE, Slicing, Slot, cut, make_slot
from dpo_cache.training.optim.streaming import Pieces, SliceStream, Transfer, transfer_to

# a function that makes an optimizer from leaves and the names of their parameters
Build = Callable[[Sequence[torch.nn.Parameter], Sequence[str]], torch.optim.Optimizer]
Gradients = Mapping[torch.nn.Parameter, torch.Tensor]

UPDATES = "updates"  # an entry of a parameter's state besides the optimizer's, as is the rest


class Updater:
    """An optimizer, with the part of torch's interface that a training loop needs.

    Updating the parameters one by one, in any order, gives the same bits as updating them at once. The state
    is the same wherever the parameters are and the updates are computed. Parameters may be this rank's rows
    of larger ones, which begin at `first_rows`; the ranks then round at random independently.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        build: Build,
        *,
        rounding: str,
        seed: int,
        slicing: Slicing | None = None,
        compute_device: torch.device | None = None,
        transfer: Transfer | None = None,
        first_rows: Mapping[str, int] | None = None,
    ):
        self.rounding, self.seed = rounding, seed
        self._moments = slicing.moments if slicing else torch.float32
        passes = transfer is not None or (compute_device is not None and compute_device.type != "cpu")
        stream_device = compute_device if passes else None
        self._slots = [make_slot(name, parameter, slicing, stream_device) for name, parameter in parameters]
        if transfer is None and compute_device and any(slot.is_streamed for slot in self._slots):
            transfer = transfer_to(compute_device)
        self._transfer = transfer
        self._place = {slot.parameter: place for place, slot in enumerate(self._slots)}
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}  # tables of 8-bit values
        self._base = build([slot.leaf for slot in self._slots], [slot.name for slot in self._slots])
        group_of = {
            leaf: place for place, group in enumerate(self._base.param_groups) for leaf in group["params"]
        }
        for slot in self._slots:
            slot.group = group_of[slot.leaf]
            slot.first = (first_rows or {}).get(slot.name, 0)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, in which `lr` is set."""
        return self._base.param_groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in the model's order."""
        return [slot.parameter for slot in self._slots]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        direct = [slot.parameter for slot in self._slots if not slot.stands_in]
        for parameter in direct:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
        if direct:
            self._base.step()  # stand-ins have no gradient now
        self.update(
            *(slot.parameter for slot in self._slots if slot.stands_in and slot.parameter.grad is not None)
        )

    @torch.no_grad()
    def update(self, *parameters: torch.nn.Parameter, gradients: Gradients | None = None) -> None:
        """Update parameters by their gradients, which are kept. Returns when the updates have ended.

        `gradients` may give gradients that are not in `parameter.grad`, such as those on the device of a
        parameter on the host.
        """
        stream = SliceStream(self._transfer) if self._transfer else None
        for parameter in parameters:
            slot = self._slots[self._place[parameter]]
            gradient = parameter.grad if gradients is None else gradients[parameter]
            assert gradient is not None
            slot.num_updates += 1
            if slot.is_sliced:
                self._update_slices(slot, gradient, stream if slot.is_streamed else None)
            else:
                self._update_whole(slot, gradient.to(parameter.device))
        if stream:
            stream.finish()

    def zero_grad(self) -> None:
        """Drop all gradients: a gradient of zeros would take memory and cause an update."""
        for slot in self._slots:
            slot.parameter.grad = None

    # -- state -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state under names `<parameter>/<state>`, the argument of `restore`. A Python int is an int64
        without dimensions.
        """
        found: dict[str, torch.Tensor] = {}
        for slot in self._slots:
            state = dict(self._base.state.get(slot.leaf, {}))
            if slot.counts and slot.num_updates:
                state |= {UPDATES: slot.num_updates, REST: slot.rest}
            found |= {
                f"{slot.name}/{key}": _as_tensor(value)
                for key, value in state.items()
                if value is not None and not key.startswith(TABLE)  # tables are constants
            }
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from the state of an updater of the same kind: later updates equal its own, bit for bit.

        Raises `TrainingError` if the state belongs to other parameters, and `KeyError` if it is incomplete.
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

    def _restore(self, slot: Slot, saved: dict[str, torch.Tensor]) -> None:
        if slot.counts:
            slot.num_updates = int(saved.pop(UPDATES))
            slot.rest = saved.pop(REST).to(slot.parameter.device) if REST in saved else None
        if slot.is_sliced or hasattr(self._base, "init_state"):
            # the optimizer's own buffers, some of which are paged
            state = self._new_state(slot)
            for key, value in state.items():
                if not key.startswith(TABLE):
                    is_many = isinstance(value, torch.Tensor)
                    state[key] = value.copy_(saved[key]) if is_many else _from_tensor(saved[key])
        else:
            fused = bool(self._base.defaults.get("fused"))
            # AdamW counts its steps on the CPU unless it is fused
            state = {
                key: _from_tensor(value if key == "step" and not fused else value.to(slot.parameter.device))
                for key, value in saved.items()
            }
        self._base.state[slot.leaf] = state

    def _new_state(self, slot: Slot) -> dict[str, Any]:
        """The state before the first update, on the parameter's device."""
        home = slot.parameter
        if hasattr(self._base, "init_state"):
            with self._only(slot):
                self._base.init_state(self._base.param_groups[0], home, 0, 0)
            made = self._base.state.pop(home)
            return {
                key: value.contiguous() if torch.is_tensor(value) else value for key, value in made.items()
            }
        moments = [torch.zeros(home.shape, dtype=self._moments, device=home.device) for _ in range(2)]
        return {"step": torch.tensor(0.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}

    # -- in slices -------------------------------------------------------------------------------------

    def _update_slices(self, slot: Slot, gradient: torch.Tensor, stream: SliceStream | None) -> None:
        """Update a parameter slice by slice, directly or through a stream, which the caller then finishes."""
        state = self._base.state.get(slot.leaf) or self._new_state(slot)
        home, step = slot.parameter.detach(), int(state["step"])
        if self.rounding == "compensated" and home.dtype == torch.bfloat16 and slot.rest is None:
            slot.rest = torch.zeros(home.shape, dtype=torch.int16, device=home.device)
        contiguous = home.contiguous()
        try:
            for start, pieces in cut(slot, contiguous.view(-1), gradient, state):
                constants = self._constants(slot.leaf.device, state, step)
                if stream is None:
                    self._change(slot, constants, start, pieces)
                    continue
                # a gradient that is already on the device is not moved
                there = {} if gradient.device == home.device else {GRADIENT: pieces.pop(GRADIENT)}
                change = partial(self._change, slot, constants, start, there=there)
                stream.run(pieces, change, unchanged=(GRADIENT,))
        finally:
            self._base.state[slot.leaf] = state
        state["step"] = state["step"] + 1
        if not home.is_contiguous():
            if stream:
                stream.finish()
            slot.parameter.copy_(contiguous)

    def _change(
        self, slot: Slot, constants: dict[str, Any], start: int, pieces: Pieces, there: Pieces | None = None
    ) -> None:
        """Update the tensors of one slice in place, on the leaf's device; `there` has more of them."""
        leaf, value, rest = slot.leaf, pieces.pop(VALUE), pieces.pop(REST, None)
        leaf.data = value.float() if rest is None else join_float(value, rest)
        leaf.grad = (pieces | (there or {})).pop(GRADIENT).to(leaf.device).float()
        moments = {key: piece for key, piece in pieces.items() if key != GRADIENT}
        wide = {
            key: moment.float() if moment.dtype == torch.bfloat16 else moment
            for key, moment in moments.items()
        }
        self._base.state[leaf] = wide | constants
        with self._only(slot):
            if hasattr(self._base, "update_step"):  # bitsandbytes: its `step` waits for the GPU
                self._base.update_step(self._base.param_groups[0], leaf, 0, 0)
            else:
                self._base.step()
        leaf.grad = None
        self._round(slot, leaf.detach(), value, rest, start)
        leaf.data = _nothing(leaf)
        for number, (key, moment) in enumerate(moments.items(), 1):
            if moment.dtype == torch.bfloat16:
                stochastic_bf16(wide[key], *self._draw(slot), -number, start=start, out=moment)
        self._base.state[leaf] = {}

    def _constants(self, device: torch.device, state: dict[str, Any], step: int) -> dict[str, Any]:
        """The state that all slices of a parameter share: the step, and the tables of 8-bit values."""
        if isinstance(state["step"], int):
            found: dict[str, Any] = {"step": step}
        else:  # the fused optimizer of torch counts on the device
            where = device if self._base.defaults.get("fused") else torch.device("cpu")
            found = {"step": torch.full((), float(step), dtype=torch.float32, device=where)}
        for key in ("qmap1", "qmap2"):
            if key in state:
                if (key, device) not in self._tables:
                    self._tables[key, device] = state[key].to(device)
                found[key] = self._tables[key, device]
        return found

    # -- whole -----------------------------------------------------------------------------------------

    def _update_whole(self, slot: Slot, gradient: torch.Tensor) -> None:
        """Update a parameter that is not cut into slices, or a stand-in for it."""
        parameter, leaf = slot.parameter, slot.leaf
        before, value = parameter.grad, parameter.detach().contiguous()
        if slot.stands_in:
            leaf.data = value.float() if slot.rest is None else join_float(value, slot.rest)
        leaf.grad = gradient.to(leaf.dtype).contiguous()
        with self._only(slot):
            self._base.step()
        leaf.grad = None
        if slot.stands_in:
            if self.rounding == "compensated" and slot.rest is None:
                slot.rest = torch.empty(value.shape, dtype=torch.int16, device=value.device)
            self._round(slot, leaf.detach(), value, slot.rest, 0)
            leaf.data = _nothing(leaf)
            if not parameter.is_contiguous():
                parameter.copy_(value)
        parameter.grad = before

    # -- both ------------------------------------------------------------------------------------------

    @contextmanager
    def _only(self, slot: Slot) -> Iterator[None]:
        """While open, the optimizer has only this parameter."""
        groups = self._base.param_groups
        self._base.param_groups = [{**groups[slot.group], "params": [slot.leaf]}]
        try:
            yield
        finally:
            self._base.param_groups = groups

    def _round(
        self, slot: Slot, wide: torch.Tensor, value: torch.Tensor, rest: torch.Tensor | None, start: int
    ) -> None:
        """Write the updated float32 values into a parameter, or into its slice that begins at `start`."""
        if value.dtype == torch.float32:
            return  # updated in place
        if value.dtype != torch.bfloat16 or self.rounding == "nearest":
            value.copy_(wide)
        elif rest is not None:
            split_float(wide, out=(value, rest))
        else:
            stochastic_bf16(wide, *self._draw(slot), start=start, out=value)

    def _draw(self, slot: Slot) -> tuple[int, ...]:
        """The integers on which a random rounding of the parameter depends."""
        draw = self.seed, slot.num_updates, self._place[slot.parameter]
        return (*draw, slot.first) if slot.first else draw


def _nothing(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=leaf.dtype, device=leaf.device)


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(value: torch.Tensor) -> Any:
    return value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else value
