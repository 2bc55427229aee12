"""How many bytes of tensors are alive at once: counted operation by operation, on real tensors or on fake
ones that hold nothing.

Every operation of torch, forward and backward, passes through a dispatch mode. What it returns in storage of
its own counts from then on, and no longer once that storage is freed, whoever held it: a variable, the graph,
a cache. What stood before counts nothing. So the peak is the allocator's, but for what an operation takes and
gives back within itself.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `now` is what the operations since its beginning have made and is still alive, `peak` the
    most of that at once, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, operation: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation.namespace == "prim":  # asks of a fake tensor what it is
            return operation(*args, **(kwargs or {}))
        self.peak = max(self.peak, self.now)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, 0)  # a view of it, or itself changed in place, is nothing new
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, None)
        # Two gradients of one tensor are added in place, but not under a dispatch mode: here the first of
        # them counts until it is let go of.
        if operation is not torch.ops.aten.add.Tensor or torch._C._current_graph_task_id() == -1:
            self.peak = max(self.peak, self.now)
        return results

    def __exit__(self, *details: Any) -> None:
        self.peak = max(self.peak, self.now)
        super().__exit__(*details)

    def _note(self, tensor: torch.Tensor, size: int | None) -> None:
        holder, own_size = _holder_of(tensor)
        if id(holder) in self._alive and self._alive[id(holder)]() is holder:
            return
        size = own_size if size is None else size
        self._alive[id(holder)] = weakref.ref(holder, _Forgetting(weakref.ref(self), id(holder), size))
        self.now += size


def allocated_peak(run: Callable[[], Any]) -> int:
    """Most bytes above those before that torch's CPU allocator had given out at once while `run` computed;
    what `LiveBytes` is checked against.
    """
    gc.collect()  # what goes while `run` computes counts as given back, whoever held it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    waiting, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(changes)), default=0)


class _Forgetting:
    """What a freed storage does to its counter."""

    def __init__(self, counter: weakref.ref[LiveBytes], name: int, size: int):
        self.counter, self.name, self.size = counter, name, size

    def __call__(self, gone: weakref.ref[Any]) -> None:
        counter = self.counter()
        if counter is None:
            return
        counter.now -= self.size
        if counter._alive.get(self.name) is gone:
            del counter._alive[self.name]


def _holder_of(tensor: torch.Tensor) -> tuple[Any, int]:
    """What keeps a tensor's memory, and its bytes: its storage, or the tensor itself where a library lays it
    out in its own way.
    """
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return storage, storage.nbytes()
    return tensor, tensor.numel() * tensor.element_size()
