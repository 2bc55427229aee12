"""The weights outside of a decoder's layers: the bottom with its tables of embeddings, the top with the head.

Tensors that are not on the device, such as weights that are trained on the host, have copies there that stay.
With `embedding` host, the two largest do not: of a table, which is read on the host, only the rows of the
given tokens travel, and its gradient stays there; the LM head is fetched when it runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.copies import Copies
from dpo_cache.lm.layerwise.held import Layout, held_directly, held_in, matrices_of
from dpo_cache.lm.layerwise.sources import copy_all
from dpo_cache.lm.model.parts import decoder_of

BOTTOM, TOP = "bottom", "top"


class Ends:
    """Opens them, also in plain calls of the model, its decoder, a table or the head."""

    def __init__(self, model: PreTrainedModel, layers: set[torch.nn.Module], copies: Copies, embedding: str):
        self._model, self._layers, self._copies = model, layers, copies
        self._flat: torch.Tensor | None = None
        self._tensors: list[torch.Tensor] = []  # whose copies are in it
        self._open: set[str] = set()
        is_apart = embedding == "host"
        head = model.get_output_embeddings()
        self._head = head if is_apart and isinstance(head, torch.nn.Module) else None
        self._tables = tables_of(model, layers) if is_apart else []
        self._rewritten = [Rewritten(one, partial(self._run, BOTTOM)) for one in {model, decoder_of(model)}]
        if self._head is not None:
            self._rewritten.append(Rewritten(self._head, partial(self._run, TOP)))
        self._rewritten += [
            Rewritten(table, partial(look_up, table, copies.device)) for table in self._tables
        ]

    def close(self) -> None:
        while self._rewritten:
            self._rewritten.pop().undo()
        self._flat = None

    def refresh(self) -> None:
        """The weights have changed."""
        self._flat = None

    @contextmanager
    def use(self, end: str) -> Iterator[None]:
        """While open, the end's weights are on the device, the LM head's only for the top."""
        if end in self._open:
            yield
            return
        with ExitStack() as stack:
            if not self._open:
                stack.enter_context(self._rest_in_place(end))
            if end == TOP and self._head is not None:
                stack.enter_context(self._head_in_place(self._head))
            self._open.add(end)
            stack.callback(self._open.remove, end)
            yield

    @contextmanager
    def _rest_in_place(self, end: str) -> Iterator[None]:
        rest = self._rest()
        held = [one for name, module in rest.items() for one in held_directly(module, name)]
        layout = self._copies.layout(held, matrices_of(rest.values()))
        if not layout.places:
            yield
            return
        if self._flat is None or not layout.is_of(self._tensors):
            self._flat, self._tensors = sent(layout, self._copies.device), layout.tensors
        with self._copies.in_place(end, layout, self._flat):
            yield

    @contextmanager
    def _head_in_place(self, head: torch.nn.Module) -> Iterator[None]:
        name = next(name for name, module in self._model.named_modules() if module is head)
        layout = self._copies.layout(held_in(head, name), matrices_of(head.modules()))
        with self._copies.in_place(TOP, layout, sent(layout, self._copies.device)):
            yield

    def _rest(self) -> dict[str, torch.nn.Module]:
        """All modules but the layers, and but tables and the head where these are apart."""
        apart = {*self._layers, *self._tables, *([] if self._head is None else [self._head])}
        left_out = {inner for module in apart for inner in module.modules()}
        return {name: module for name, module in self._model.named_modules() if module not in left_out}

    def _run(self, end: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.use(end):
            return forward(*args, **kwargs)


def look_up(table: Any, device: torch.device, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The rows of the tokens, on the device, from a table on the host."""
    args, kwargs = _moved((args, kwargs), table.weight.device)
    return _moved(forward(*args, **kwargs), device)


def _moved(values: Any, device: torch.device) -> Any:
    """The values with their tensors on a device."""
    return tree_map_only(torch.Tensor, lambda one: one.to(device, non_blocking=device.type != "cpu"), values)


def tables_of(model: PreTrainedModel, layers: set[torch.nn.Module]) -> list[torch.nn.Module]:
    """The tables of embeddings outside the layers that have a row for each token.

    None where the model's code reads rows of a table's weight without calling it, as Gemma 4's does.
    """
    inner = {module for layer in layers for module in layer.modules()}
    kinds = {type(one) for one in model.modules() if one not in inner}
    if any(_reads_rows(kind) for kind in kinds):  # type: ignore[arg-type]  # mypy: __hash__ of modules
        return []
    tables = [
        module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module not in inner
    ]
    largest = max((table.num_embeddings for table in tables), default=0)
    return [table for table in tables if 2 * table.num_embeddings >= largest]


@cache
def _reads_rows(kind: type[torch.nn.Module]) -> bool:
    try:
        return re.search(r"embed\w*\.weight\[", inspect.getsource(kind.forward)) is not None
    except (OSError, TypeError):
        return False


def sent(layout: Layout, device: torch.device) -> torch.Tensor:
    """The copies in new flat memory of the device."""
    flat = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
    with torch.no_grad():
        copy_all(layout, flat)
    return flat


class Rewritten:
    """A forward in place of a module's own: `function(forward, *args)`.

    Unlike one of `Patches`, it stays when a model is run `without_patches`: without its weights it does not
    run. A copy of the module would call the original.
    """

    def __init__(self, module: torch.nn.Module, function: Callable[..., Any]):
        self._module, self._function, self._forward = module, function, module.forward
        self._before = module.__dict__.get("forward")
        self.__wrapped__ = module.forward  # for its signature
        module.forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._forward, *args, **kwargs)

    def __deepcopy__(self, _: Any) -> None:
        raise ModelError(
            f"an adapter trains a copy of a whole {type(self._module).__name__}, whose weights are not on "
            "the device.\nLeave it out of the adapter, or keep the weights on the device."
        )

    def undo(self) -> None:
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before  # type: ignore[method-assign]
