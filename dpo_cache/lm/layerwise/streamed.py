"""A model whose layers' weights are on the host or on disk, and on the device only while their layer runs.

    with StreamedWeights(model, layers, HostWeights(), device) as weights:
        with weights.use(0, then=1):
            state = layers[0](state, ...)

The model's parameters stay where they are and keep their identity; a copy on the device is in the place of
each while its layer is in use. The copy of a parameter that needs a gradient is a leaf; `leaves` has them.

A plain call of the model works, too: each layer opens its own weights, and the ends theirs (`ends.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import STREAMED, computes_on
from dpo_cache.lm.layerwise.copies import Copies
from dpo_cache.lm.layerwise.ends import BOTTOM, TOP, Ends, Rewritten
from dpo_cache.lm.layerwise.held import Held, Layout, copy_of, exchanged, held_in, matrices_of
from dpo_cache.lm.layerwise.packed import LayerUse, is_packed, run_packed
from dpo_cache.lm.layerwise.sources import WeightSource
from dpo_cache.lm.layerwise.transfer import Ring, Shelf, Transfer, transfer_to


class StreamedWeights:
    """Weights of layers that are fetched when their layer runs; see the module's docstring.

    `layers` are in the order of their calls; one that is called twice is there twice. With a `transfer`
    given, all tensors travel, even where they are on the device already. `embedding` is where
    the tables of embeddings and the LM head are kept, device or host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[torch.nn.Module],
        source: WeightSource,
        device: torch.device,
        *,
        compute_dtype: torch.dtype | None = None,
        transfer: Transfer | None = None,
        embedding: str = "device",
    ):
        self.layers, self.source, self.device = list(layers), source, device
        self._copies = Copies(device, compute_dtype, copies_all=transfer is not None)
        self._transfer = transfer or transfer_to(device)
        self.ring = self._make_ring(self._transfer)
        self._open: set[int] = set()
        self._tensors: list[list[torch.Tensor]] = [[] for _ in self.layers]  # whose copies were fetched last
        self.num_uses = [0] * len(self.layers)
        names = {module: name for name, module in model.named_modules()}
        self._names = [names[layer] for layer in self.layers]
        self._model = model
        self._known = {id(held.tensor) for held in held_in(model, "")}
        self._kind = type(model)
        model.__class__ = computes_on(device, self._kind, **{STREAMED: self})
        self._ends = Ends(model, set(self.layers), self._copies, embedding)
        self._rewritten: list[Rewritten] = []
        for index in sorted({self._first(index) for index in range(len(self.layers))}):
            self._rewritten.append(Rewritten(self.layers[index], partial(self._run, index)))
            for module in self.layers[index].modules() if self._layout(index).places else ():
                if is_packed(module):
                    self._rewritten.append(Rewritten(module, partial(self._run_packed, index)))

    def _make_ring(self, transfer: Transfer) -> Ring:
        return Ring(transfer)

    def __enter__(self) -> StreamedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was, and free the copies."""
        while self._rewritten:
            self._rewritten.pop().undo()
        self._model.__class__ = self._kind
        self._ends.close()
        self._transfer.close()
        self.source.close()
        self.ring.free()

    @contextmanager
    def use(self, index: int, *, then: int | None = None) -> Iterator[None]:
        """While open, layer `index` has its weights on the device; those of `then` are fetched meanwhile."""
        index = self._first(index)
        if index in self._open:
            yield
            return
        layout = self._fetch(index)
        with self._opened(index, layout) as flat:
            if then is not None and self._first(then) not in self._open:
                self._fetch(self._first(then))
            with self._copies.in_place(index, layout, flat, is_reused=True):
                yield

    def is_open(self, index: int) -> bool:
        """Return whether layer `index` has its weights on the device."""
        return self._first(index) in self._open

    def use_bottom(self) -> AbstractContextManager[None]:
        """While open, what runs before the first layer has its weights on the device."""
        return self._ends.use(BOTTOM)

    def use_top(self) -> AbstractContextManager[None]:
        """While open, what runs after the last layer has its weights on the device, the LM head's too."""
        return self._ends.use(TOP)

    def leaves(self, key: int | str) -> dict[str, torch.Tensor]:
        """The latest copies of the parameters that need a gradient, by the parameter's name in the model.

        `key` is a layer's index, "bottom" or "top". A gradient stays with the name until the caller sets it
        to None, as that of a parameter does. It has the dtype of the copy. A name is that of
        `model.named_parameters(remove_duplicate=False)`.
        """
        return self._copies.leaves(self._first(key) if isinstance(key, int) else key)

    def refresh(self, key: int | str | None = None) -> None:
        """Fetch a layer's weights again, or an end's, because they have changed; None: all."""
        if not isinstance(key, int):
            self._ends.refresh()
        for index in range(len(self.layers)) if key is None else [key]:
            if isinstance(index, int):
                self.ring.forget(self._first(index))

    @torch.no_grad()
    def keep(self, layer: torch.nn.Module) -> None:
        """Give a layer parameters of its own with its weights, on the host, which stay after `close`."""
        index = self.layers.index(layer)
        layout = self._layout(index)
        flat = torch.empty(layout.num_bytes, dtype=torch.uint8)
        self.source.fill(index, layout, flat)
        made: dict[int, torch.Tensor] = {}
        for place in layout.places:
            tensor = place.held.tensor
            place.held.put(made.setdefault(id(tensor), copy_of(tensor, place.view(flat))))

    @contextmanager
    def adapting(self) -> Iterator[None]:
        """In this block, PEFT puts an adapter into the model; then its tensors move to the device.

        PEFT moves an adapter to where the weight under it is. A weight that is not in memory has NaN in its
        place meanwhile, which takes no memory. Raises `ModelError` for an adapter that starts from weights.
        """
        empty = [one for one in held_in(self._model, "") if one.tensor.is_meta]
        shown = [(one, _placeholder(one.tensor)) for one in empty]
        with exchanged(shown):
            yield
        for held, placeholder in shown:
            held.tensor.requires_grad_(placeholder.requires_grad)
        added = [one for one in held_in(self._model, "") if id(one.tensor) not in self._known]
        for held in added:
            if held.tensor.is_floating_point() and not held.tensor.isfinite().all():
                raise ModelError(
                    f"{held.name}: this part of the adapter starts from the weights under it, which are not "
                    "in memory while they are read layer by layer.\n"
                    "Use plain LoRA, or keep the weights on the device or the host."
                )
            held.move(held.tensor.data.to(self.device))
        self.refresh()  # layers have other tensors now, under other names
        self._copies.forget()

    @contextmanager
    def _opened(self, index: int, layout: Layout) -> Iterator[torch.Tensor]:
        """The copies in flat memory of the device."""
        flat = self.ring.open(index) if layout.places else torch.empty(0, dtype=torch.uint8)
        self._open.add(index)
        self.num_uses[index] += 1
        try:
            yield flat
        finally:
            self._open.remove(index)
            if layout.places:
                self.ring.close(index)

    def _fetch(self, index: int) -> Layout:
        assert index not in self._open, "the copies of a layer in use are in the place of its tensors"
        layout = self._layout(index)
        if not self.ring.slot_bytes and not self._open:
            self.ring.slot_bytes = max(self._layout(one).num_bytes for one in range(len(self.layers)))
        if not layout.is_of(self._tensors[index]):
            self.ring.forget(index)
            self._tensors[index] = layout.tensors
        if layout.places:
            self.ring.fetch(index, layout.num_bytes, partial(self.source.fill, index, layout))
        return layout

    def _layout(self, index: int) -> Layout:
        held = self._held(index)
        added = [one for one in held if id(one.tensor) not in self._known]  # by an adapter
        stay = {id(one.tensor) for one in added if self._copies.is_here(one.tensor)}
        matrices = matrices_of(self.layers[index].modules()) - {id(one.tensor) for one in added}
        moving = [one for one in held if id(one.tensor) not in stay]
        return self._copies.layout(moving, matrices, self.source.start_of)

    def _held(self, index: int) -> list[Held]:
        return held_in(self.layers[index], self._names[index])

    def _first(self, index: int) -> int:
        """The index of the first call of a layer."""
        return self.layers.index(self.layers[index])

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward in a plain call of the model."""
        with self.use(index, then=(index + 1) % len(self.layers)):
            return forward(*args, **kwargs)

    def _run_packed(
        self, index: int, forward: Callable[..., torch.Tensor], inputs: torch.Tensor
    ) -> torch.Tensor:
        """A forward inside a layer that has weights of bitsandbytes."""
        return run_packed(LayerUse(self, index), forward, inputs)


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """NaN of the shape and dtype, in the memory of one number."""
    value = torch.full((), torch.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    shown = value.expand(tensor.shape)
    if not isinstance(tensor, torch.nn.Parameter):
        return shown
    return torch.nn.Parameter(shown, requires_grad=tensor.requires_grad)


class PersistentCopies(StreamedWeights):
    """The same with copies of all layers on the device, for weights that are trained on the host.

    After each update of a layer's weights, `refresh(index)` lets its next use fetch them again.
    """

    def _make_ring(self, transfer: Transfer) -> Ring:
        return Shelf(transfer)
