"""How the tensors of one layer are made from those in a checkpoint's files, by transformers' own conversion.

A *piece* is a stored tensor that only gets another name and dtype, or the stored tensors that one converter
of transformers makes into others: separate experts into a stack, for example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.stored_tensors import StoredTensor

Load = Callable[[StoredTensor], torch.Tensor]


@dataclass
class Piece:
    """Stored tensors that are converted together."""

    target: str  # the name in the model; of several, one from which the converter derives them
    dtype: torch.dtype  # to which the stored tensors are cast before
    converter: WeightConverter | None
    sources: list[tuple[str, str, StoredTensor]] = field(default_factory=list)  # name, pattern, tensor
    targets: list[str] = field(default_factory=list)  # all of them, once they are known

    def convert(self, model: PreTrainedModel, load: Load) -> dict[str, torch.Tensor]:
        """The tensors by their names in the model; `load` reads a stored one."""
        if self.converter is None:
            ((_, _, stored),) = self.sources
            return {self.target: load(stored).to(self.dtype)}
        converter = copy.deepcopy(self.converter)
        for name, pattern, stored in self.sources:
            read: Any = partial(self._read, load, stored)  # called when the converter needs it
            converter.add_tensor(self.target, name, pattern, read)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def _read(self, load: Load, stored: StoredTensor) -> torch.Tensor:
        return load(stored).to(self.dtype)


def find_pieces(model: PreTrainedModel, mapping: list[Any], stored: dict[str, StoredTensor]) -> list[Piece]:
    """The pieces that make up a model; `mapping` is that with which it was loaded.

    Follows `convert_and_load_state_dict_in_model`, and leaves out what the model does not load. The tensors
    of `model` have the dtypes that they are loaded in.
    """
    state, prefix = model.state_dict(), model.base_model_prefix
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    pieces: dict[str, Piece] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        converter = None if pattern is None else by_pattern[pattern]
        piece = pieces.setdefault(target, Piece(target, state[target].dtype, converter))
        if piece.converter is None:
            piece.sources = []  # a later one replaces it
        piece.sources.append((name, pattern or name, stored[name]))
    return list(pieces.values())


def pieces_by_layer(
    model: PreTrainedModel, pieces: list[Piece], layers: list[str], *, converts: bool = True
) -> tuple[list[list[Piece]], list[Piece]]:
    """The pieces of each layer, whose names in the model are `layers`, and the others.

    Without `converts`, a converter's first tensor decides: those of quantized formats make only that one.
    Raises `ModelError` where a piece holds tensors of several layers: to read one of them is to read all.
    """
    found: list[list[Piece]] = [[] for _ in layers]
    others = list[Piece]()
    for piece in pieces:
        is_made = converts and piece.converter is not None
        piece.targets = [*piece.convert(model, StoredTensor.on_meta)] if is_made else [piece.target]
        owners = {_layer_of(target, layers) for target in piece.targets}
        if len(owners) > 1:
            raise ModelError(
                f"{piece.sources[0][0]}: the checkpoint stores weights of several layers in this tensor, and "
                "they cannot be fetched layer by layer.\nKeep the weights on the device, or load and "
                "`save_pretrained` the model once."
            )
        owner = owners.pop()
        (others if owner is None else found[owner]).append(piece)
    return found, others


def _layer_of(name: str, layers: list[str]) -> int | None:
    return next((index for index, layer in enumerate(layers) if name.startswith(f"{layer}.")), None)
