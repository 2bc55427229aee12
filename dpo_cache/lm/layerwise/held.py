"""The tensors of a module: where each is held, the layout of their copies in flat memory, and the exchange.

A tensor is an entry of `_parameters` or `_buffers` of a submodule, or an attribute: bitsandbytes holds scales
in the `quant_state` of a 4-bit weight, and in the `state` of an 8-bit layer. The model's parameters keep
their identity: a copy is in their place only while it is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from transformers.pytorch_utils import Conv1D

ALIGNMENT = 512  # bytes; as in the allocator of CUDA
CACHE_LINE = 64  # bytes; on a CPU some products round by where in it a matrix starts

COMPANIONS = ("absmax", "code", "offset", "CB", "SCB")  # tensors that bitsandbytes keeps as attributes


@dataclass(frozen=True)
class Held:
    """A tensor, and the entry or attribute that it is held in."""

    owner: Any  # a dict, or an object with attributes
    key: str
    name: str  # in the model
    tensor: torch.Tensor

    def get(self) -> Any:
        """The present object in its place."""
        return self.owner.get(self.key) if isinstance(self.owner, dict) else getattr(self.owner, self.key)

    def put(self, tensor: torch.Tensor) -> None:
        """Let another tensor be in its place."""
        if isinstance(self.owner, dict):
            self.owner[self.key] = tensor
        else:
            setattr(self.owner, self.key, tensor)

    def move(self, moved: torch.Tensor) -> None:
        """Let its home be another device; a parameter keeps its identity, and so do tied ones."""
        if isinstance(self.tensor, torch.nn.Parameter):
            self.tensor.data = moved
        else:
            self.put(moved)


def held_in(module: torch.nn.Module, prefix: str) -> list[Held]:
    """All tensors of a module and its submodules; `prefix` is the module's name in the model."""
    found: list[Held] = []
    for path, one in module.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        found += held_directly(one, name)
    return found


def held_directly(module: torch.nn.Module, name: str) -> list[Held]:
    """Those of a module without its submodules'."""
    found: list[Held] = []
    for entries in (module._parameters, module._buffers):
        for key, tensor in entries.items():
            if tensor is not None:
                found.append(Held(entries, key, f"{name}.{key}" if name else key, tensor))
                found += _companions(tensor, f"{name}.{key}")
    state = getattr(module, "state", None)
    if type(state).__name__ == "MatmulLtState":
        found += _attributes(state, f"{name}.state")
    return found


def _companions(tensor: torch.Tensor, name: str) -> list[Held]:
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return []
    inner = getattr(state, "state2", None)
    return _attributes(state, f"{name}.quant_state") + (
        [] if inner is None else _attributes(inner, f"{name}.quant_state.state2")
    )


def _attributes(owner: Any, name: str) -> list[Held]:
    return [
        Held(owner, key, f"{name}.{key}", tensor)
        for key in COMPANIONS
        if isinstance(tensor := getattr(owner, key, None), torch.Tensor)
    ]


def matrices_of(modules: Iterable[torch.nn.Module]) -> set[int]:
    """The ids of the modules' own weights that mixed precision multiplies in bf16: of linear layers, and
    experts' stacks.

    It leaves those of norms and embeddings in float32, and stacks that grouped products multiply.
    """
    found, tables = set(), set()
    for one in modules:
        is_linear = isinstance(one, torch.nn.Linear | Conv1D)
        is_grouped = getattr(getattr(one, "config", None), "_experts_implementation", None) == "grouped_mm"
        for key, tensor in one._parameters.items():
            if tensor is not None and (
                (is_linear and key == "weight") or (tensor.ndim == 3 and not is_grouped)
            ):
                found.add(id(tensor))
        if isinstance(one, torch.nn.Embedding):
            tables.add(id(one.weight))
    return found - tables  # one that is both is read in float32


@dataclass(frozen=True)
class Place:
    """Where the copy of a tensor is in flat memory."""

    held: Held
    dtype: torch.dtype
    start: int  # byte

    @property
    def num_bytes(self) -> int:
        return _num_elements(self.held.tensor) * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The copy in flat memory, with the strides of the tensor, on which the rounding of a product may
        depend.
        """
        values = flat[self.start : self.start + self.num_bytes].view(self.dtype)
        tensor = self.held.tensor
        return values.as_strided(tensor.shape, tensor.stride(), values.storage_offset())


@dataclass(frozen=True)
class Layout:
    """The copies of a unit's tensors, one after the other."""

    places: list[Place]
    num_bytes: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [place.held.tensor for place in self.places]

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these are its tensors: a module may have put others in their places."""
        own = self.tensors
        return len(own) == len(tensors) and all(one is other for one, other in zip(own, tensors, strict=True))


def lay_out(tensors: Sequence[tuple[Held, torch.dtype, int]]) -> Layout:
    """A place for each tensor, in its dtype; the same memory has one place.

    The last number is how many bytes it starts after a multiple of `ALIGNMENT`.
    """
    places: list[Place] = []
    starts: dict[Any, int] = {}
    end = 0
    for held, dtype, remainder in tensors:
        key = _memory(held.tensor), dtype
        if key not in starts:
            starts[key] = end + remainder
            num_bytes = remainder + _num_elements(held.tensor) * dtype.itemsize
            end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        places.append(Place(held, dtype, starts[key]))
    return Layout(places, end)


def _memory(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same memory."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _num_elements(tensor: torch.Tensor) -> int:
    """From the first to the last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def copy_of(home: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """The view as what holds the place of `home`: a leaf that needs a gradient where that does, of its class.

    A subclass keeps its attributes: a 4-bit weight finds the state of its quantization there. Its changes in
    place are counted apart from those of the other views: PEFT sets experts' weights to themselves when it
    puts an adapter on them, within a layer's forward.
    """
    if is_fake(home):
        return view.detach().requires_grad_(home.requires_grad)
    if type(home) is torch.nn.Parameter:
        return torch.nn.Parameter(view.data, home.requires_grad)  # code may ask whether it is one
    if type(home) is torch.Tensor:
        return view.data.requires_grad_(home.requires_grad)
    copy = torch.Tensor._make_subclass(type(home), view.data, home.requires_grad)
    copy.__dict__.update(home.__dict__)
    return copy


@contextmanager
def exchanged(copies: Sequence[tuple[Held, torch.Tensor]]) -> Iterator[None]:
    """While open, each tensor's copy is in its place.

    An object that the module itself puts there meanwhile stays, such as rotary tables for longer rows.
    """
    for held, copy in copies:
        held.put(copy)
    try:
        yield
    finally:
        for held, copy in copies:
            if held.get() is copy:
                held.put(held.tensor)
