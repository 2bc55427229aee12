"""CUDA tensors without values, on a machine without a GPU: a CUDA build of torch gives their shapes, dtypes and devices.

    with fake_cuda(), torch.device("cuda"):
        model = ...
        with Operators() as operators:
            ...  # forward; the backward engine asks for a driver
    operators.launches, operators.waits

`make test-fake-cuda` runs these tests in an environment of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cache.types import Completion

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(),
    reason="needs a CUDA build of torch on a machine without a GPU: `make test-fake-cuda`",
)

# Operators whose result the host needs: it waits until the device has computed it.
WAITING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
)
FREE = (
    "_unsafe_view",
    "detach",
    "alias",
)  # they start nothing on the device, and are no views by their schema


_open: list[Operators] = []


class FakeEvent:
    def synchronize(self) -> None:
        for operators in _open:
            operators.waits.append("for an event")


class FakeStream:
    """A stream on which nothing runs."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record_event(self, event: Any = None) -> FakeEvent:
        return event or FakeEvent()

    def wait_event(self, _: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def synchronize(self) -> None:
        for operators in _open:
            operators.waits.append("for a stream")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """While open, tensors have no values, those on CUDA included; streams and events do nothing."""

    @contextmanager
    def on_stream(_: Any) -> Iterator[None]:
        yield

    with ExitStack() as stack:
        for name, value in (
            ("Stream", FakeStream),
            ("Event", FakeEvent),
            ("current_stream", FakeStream),
            ("stream", on_stream),
            ("is_bf16_supported", lambda: True),
            ("get_device_capability", lambda *_: (9, 0)),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # else autocast is off, with a warning
        stack.enter_context(
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        )
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


class Operators(TorchDispatchMode):
    """Counts the operators that start something on the device, and those for which the host waits."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: list[str] = []
        self._functions = _Functions(self)
        self._is_within = False  # an operator that counts as one

    @property
    def launches(self) -> int:
        return sum(self.counts.values())

    def __enter__(self) -> Operators:
        super().__enter__()
        self._functions.__enter__()
        _open.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _open.remove(self)
        self._functions.__exit__(*error)
        super().__exit__(*error)

    def add(self, name: str) -> None:
        if not self._is_within:
            self.counts[name] += 1

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        self.add(name)
        before, self._is_within = self._is_within, True
        try:
            yield
        finally:
            self._is_within = before

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operator)
        short = name.split("::")[-1].split(".")[1] if name.startswith("aten.") else name
        kwargs = kwargs or {}
        if short in WAITING or _uses_bools_as_index(short, args):
            self.waits.append(name)
        output = operator(*args, **kwargs)
        if _is_blocking_copy(short, args, kwargs, output):
            self.waits.append(f"{name} between host and device")
        if _is_on_cuda(output) and not getattr(operator, "is_view", False) and short not in FREE:
            self.add(name)
        return output


class _Functions(TorchFunctionMode):
    """torch's fused attention, which is one operator on a GPU, and chosen there."""

    def __init__(self, operators: Operators):
        super().__init__()
        self._operators = operators

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            with self._operators.as_one("scaled_dot_product_attention"):
                query, _, value = args[:3]
                return query @ query.transpose(2, 3) @ torch.zeros_like(query[..., :1]) * value[:, :1, :1]
        return function(*args, **kwargs)


def _is_blocking_copy(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> bool:
    """Whether values are copied between host and device, and the host waits for the copy."""
    if name == "copy_":
        source, is_asynchronous = args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    elif name == "_to_copy":
        source, is_asynchronous = args[0], kwargs.get("non_blocking", False)
    else:
        return False
    return not is_asynchronous and source.device.type != output.device.type


def _uses_bools_as_index(name: str, args: Any) -> bool:
    """Such an index is turned into places, whose number the host must know."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _is_on_cuda(values: Any) -> bool:
    return any(
        isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"
        for leaf in torch.utils._pytree.tree_leaves(values)
    )


def make_pairs(num_pairs: int, prompt: int, answer: int, vocab_size: int = 264) -> list[Completion]:
    """Two random answers to each of some random prompts, of these lengths."""
    generator = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, vocab_size, length).astype(np.uint32)

    prompts = [ids(prompt) for _ in range(num_pairs)]
    return [Completion(one, ids(answer)) for one in prompts for _ in range(2)]
