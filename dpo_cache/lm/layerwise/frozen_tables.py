"""Frozen tables of embeddings on the host, under a model whose other weights are on the device.

    with tables_on_host(model, device):
        model(ids)  # the same bits: the rows of the tokens are read on the host, and only they travel

A table is only looked up in, so a device needs no more of it than the rows of a step: of the 2.1 GB of a 70B
Llama's table some 34 MB for 2,048 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.device import computes_on
from dpo_cache.lm.layerwise.ends import Rewritten, look_up, tables_of
from dpo_cache.lm.layerwise.held import held_in
from dpo_cache.lm.layerwise.record import outermost_layers
from dpo_cache.lm.model.parts import decoder_of


def frozen_tables(model: PreTrainedModel, layers: set[torch.nn.Module]) -> list[torch.nn.Module]:
    """The tables of embeddings outside the layers that have a row for each token and are only looked up in:
    not trained, not under an adapter, and without a weight that another module has, such as the LM head.
    """
    head = model.get_output_embeddings()
    if head is None:  # the code may multiply by the table's weight
        return []
    wrapped = {
        inner
        for module in model.modules()
        if type(module).__module__.startswith("peft.")
        for inner in module.modules()
    }
    uses = Counter(id(one) for module in model.modules() for one in module._parameters.values())
    return [
        table
        for table in tables_of(model, layers)
        if table not in wrapped
        and table is not head
        and all(uses[id(one)] == 1 and not one.requires_grad for one in table.parameters())
    ]


@contextmanager
def tables_on_host(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """While open, the frozen tables are in host memory, and the model computes on the device as before."""
    tables = frozen_tables(model, {*outermost_layers(decoder_of(model))})
    held = [one for table in tables for one in held_in(table, "")]
    homes = [one.tensor.device for one in held]
    for one in held:
        one.move(one.tensor.data.to("cpu"))
    rewritten = [Rewritten(table, partial(look_up, table, device)) for table in tables]
    kind = type(model)
    model.__class__ = computes_on(device, kind)  # else `model.device` would be that of its first weight
    try:
        yield
    finally:
        model.__class__ = kind
        while rewritten:
            rewritten.pop().undo()
        for one, home in zip(held, homes, strict=True):
            one.move(one.get().data.to(home))
