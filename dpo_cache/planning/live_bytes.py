"""The number of bytes of tensors that are alive at once, counted operation by operation, on real or fake
tensors.

Every operation of torch, forward and backward, passes through a dispatch mode. A result with new storage
counts until that storage is freed, whether a variable, the graph or a cache holds it. Older tensors do
not count. So the peak equals the allocator's, except for memory that an operation takes and frees internally.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While open, `now` is the number of bytes of live results, and `peak` the largest such number."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, operation: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation.namespace == "prim":  # queries about a fake tensor, such as its device
            return operation(*args, **(kwargs or {}))
        self.peak = max(self.peak, self.now)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, 0)  # a view, or a tensor changed in place, adds no storage
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, None)
        # Outside a dispatch mode, the engine adds two gradients of one tensor in place; inside, the first of
        # them stays alive a moment longer.
        if operation is not torch.ops.aten.add.Tensor or torch._C._current_graph_task_id() == -1:
            self.peak = max(self.peak, self.now)
        return results

    def take_peak(self) -> int:
        """Return the peak so far, and start a new one from the bytes that are alive now."""
        peak, self.peak = max(self.peak, self.now), self.now
        return peak

    def __exit__(self, *details: Any) -> None:
        self.peak = max(self.peak, self.now)
        super().__exit__(*details)

    def _note(self, tensor: torch.Tensor, size: int | None) -> None:
        holder, own_size = _holder_of(tensor)
        if id(holder) in self._alive and self._alive[id(holder)]() is holder:
            return
        size = own_size if size is None else size
        self._alive[id(holder)] = weakref.ref(holder, partial(_forget, weakref.ref(self), id(holder), size))
        self.now += size


def allocated_peak(run: Callable[[], Any]) -> int:
    """Peak bytes of torch's CPU allocator during `run`, above those before. Tests compare `LiveBytes` with
    it.
    """
    gc.collect()  # garbage that is freed during `run` would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    waiting, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(changes)), default=0)


def _forget(counter: weakref.ref[LiveBytes], name: int, size: int, freed: weakref.ref[Any]) -> None:
    """Subtract a freed storage from its counter."""
    if (live := counter()) is not None:
        live.now -= size
        if live._alive.get(name) is freed:
            del live._alive[name]


def _holder_of(tensor: torch.Tensor) -> tuple[Any, int]:
    """The object that holds a tensor's memory, and its bytes: the storage, or the tensor itself in a layout
    without storage.
    """
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return storage, storage.nbytes()
    return tensor, tensor.numel() * tensor.element_size()
