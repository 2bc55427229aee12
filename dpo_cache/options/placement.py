"""Where a training run keeps its weights, gradients, optimizer state and layer inputs.

A preset of `memory` is a placement; `place` changes single entries of it, as in
`weights=host,optimizer=device`. Under every placement but `FAST`, a step runs layer by layer (layer-major):
all its forests pass one layer before the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dpo_cache.errors import OptionError

PLACES = {
    "weights": ("device", "host", "disk"),
    "gradients": ("device", "host", "none"),
    "optimizer": ("device", "host"),
    "inputs": ("device", "host"),
}


@dataclass(frozen=True)
class Placement:
    """Where each kind of tensor is between its uses; the device is where the model computes.

    weights: `host` and `disk` fetch a layer's weights when it runs; `disk` is for frozen weights.
    gradients: `host` moves a layer's gradients when they are whole; `none` updates the layer then and drops
        them, so that there is no clipping.
    optimizer: the state, and the weights that it updates; under `host`, the device has copies of these.
    inputs: of the layers, which the backward pass starts from.
    is_layer_major: whether steps run layer by layer.
    """

    weights: str = "device"
    gradients: str = "device"
    optimizer: str = "device"
    inputs: str = "device"
    is_layer_major: bool = True

    def __str__(self) -> str:
        """As the option `place` takes it."""
        return ",".join(f"{name}={getattr(self, name)}" for name in PLACES)


FAST = Placement(is_layer_major=False)
SMALL = Placement(gradients="host", optimizer="host", inputs="host")
LEAST = Placement(weights="host", gradients="none", optimizer="host", inputs="host")
PRESETS = {"fast": FAST, "small": SMALL, "least": LEAST}  # from the fastest down
# An adapter, its gradients and its state are small, and stay on the device
ADAPTER_PRESETS = {
    "fast": FAST,
    "small": Placement(inputs="host"),
    "least": Placement(weights="host", inputs="host"),
}
MEMORY = ("auto", *PRESETS)


def next_preset(placement: Placement) -> str | None:
    """The preset that keeps less on the device than this placement; None where none does."""
    if not placement.is_layer_major or (placement.optimizer, placement.inputs) == ("device", "device"):
        return "small"
    return "least" if placement.weights == "device" else None


def placement_of(memory: str, place: str | None = None, *, is_adapted: bool = False) -> Placement | None:
    """The placement of a preset, with the entries of `place` in it; None for auto without entries.

    Under `auto` and `fast`, entries start from a layer-major step with everything on the device. Gradients
    and optimizer state of an adapter are small, and stay on the device. Raises `OptionError` for entries that
    are not known, or do not fit together.
    """
    presets = ADAPTER_PRESETS if is_adapted else PRESETS
    if place is None:
        return None if memory == "auto" else presets[memory]
    start = presets.get(memory, FAST)
    placement = replace(start, is_layer_major=True, **_entries(place))
    _check(placement, place, is_adapted=is_adapted)
    if is_adapted and placement.gradients == "host":
        placement = replace(placement, gradients="device")
    return replace(placement, optimizer="device") if is_adapted else placement


def _entries(place: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in place.split(","):
        name, value = (part.strip().lower() for part in f"{entry}=".split("=")[:2])
        if name not in PLACES or value not in PLACES[name]:
            known = "; ".join(f"{one}={'|'.join(values)}" for one, values in PLACES.items())
            raise OptionError(f"`place` {entry.strip() or place}: not known.\nGive some of {known}.")
        if name in found:
            raise OptionError(f"`place` {place}: {name} is given twice.")
        found[name] = value
    return found


def _check(placement: Placement, place: str, *, is_adapted: bool) -> None:
    assert {entry.name for entry in fields(placement)} == {*PLACES, "is_layer_major"}
    if placement.gradients == "device" and placement.optimizer == "host":
        raise OptionError(
            f"`place` {place}: gradients stay on the device, and the optimizer that reads them is on the "
            "host.\nGive gradients=host, or optimizer=device."
        )
    if placement.weights == "disk" and not is_adapted:
        raise OptionError(
            f"`place` {place}: all weights are trained, and files of a checkpoint do not change.\n"
            "Give weights=host, or train an adapter (`lora_r`)."
        )
    if placement.weights == "host" and placement.optimizer == "device" and not is_adapted:
        raise OptionError(
            f"`place` {place}: all weights are trained, and the optimizer on the device updates weights "
            "there.\nGive optimizer=host, or weights=device."
        )
