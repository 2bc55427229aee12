"""Weights of layers from a checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.conversion import Piece
from dpo_cache.lm.layerwise.held import Layout, Place, held_in
from dpo_cache.lm.model.stored_tensors import StoredTensor, StoredTensors


def disk_weights(model: PreTrainedModel, stored: StoredTensors, pieces: Iterable[Piece]) -> DiskWeights:
    """The source of the tensors of a model that have no values, which these pieces make.

    Raises `ModelError` where others make them: weights that layers share with what is outside of them.
    """
    by_target = {target: piece for piece in pieces for target in piece.targets}
    names = dict[int, str]()
    for held in held_in(model, ""):
        if held.tensor.is_meta and (held.name in by_target or id(held.tensor) not in names):
            names[id(held.tensor)] = held.name
    if lost := [name for name in names.values() if name not in by_target]:
        raise ModelError(
            f"{lost[0]}: this weight of {type(model).__name__} is shared with a module outside of the layers "
            "and cannot be read layer by layer.\nKeep the weights on the device or on the host."
        )
    return DiskWeights(model, stored, by_target, names)


class DiskWeights:
    """Reads a layer's tensors each time, and converts them as `from_pretrained` does: the same bits.

    `pieces` has the piece that makes a tensor, by the tensor's name when the model was loaded. An adapter
    gives modules other names, so that the tensors without values are known by their ids: `names`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: StoredTensors,
        pieces: Mapping[str, Piece],
        names: Mapping[int, str],
    ):
        self._model, self._stored, self._pieces, self._names = model, stored, pieces, names
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._starts = {
            piece.target: stored.start
            for piece in pieces.values()
            for _, _, stored in piece.sources
            if piece.converter is None and stored.dtype == piece.dtype
        }

    @property
    def num_bytes_read(self) -> int:
        """From the files, so far."""
        return self._stored.num_bytes_read

    def start_of(self, tensor: torch.Tensor) -> int:
        """Where a tensor starts in its file, from which a resident one is mapped if it is used as stored."""
        name = self._names.get(id(tensor))
        if name is None:
            return tensor.data_ptr()
        return self._starts.get(name, 0)

    def close(self) -> None:
        self._stored.close()

    @torch.no_grad()
    def fill(self, _: int, layout: Layout, flat: torch.Tensor) -> None:
        places = dict[str, list[Place]]()
        for place in layout.places:
            name = self._names.get(id(place.held.tensor))
            if name is None:
                place.view(flat).copy_(place.held.tensor)
            else:
                places.setdefault(name, []).append(place)
        while places:
            self._fill(self._pieces[next(iter(places))], places, flat)

    def _fill(self, piece: Piece, places: dict[str, list[Place]], flat: torch.Tensor) -> None:
        if piece.converter is None:
            for place in places.pop(piece.target, []):
                self._read_to(place.view(flat), piece)
            return
        made = piece.convert(self._model, StoredTensor.read)
        for name in [*made]:
            for place in places.pop(name, []):
                place.view(flat).copy_(made[name])
            del made[name]

    def _read_to(self, target: torch.Tensor, piece: Piece) -> None:
        """Read a tensor that only has another name, and cast it into its place without a copy between."""
        ((_, _, stored),) = piece.sources
        if stored.dtype == piece.dtype == target.dtype and target.is_contiguous() and target.numel():
            stored.read(target.view(-1).view(torch.uint8))
            return
        if self._buffer.numel() < stored.num_bytes:
            self._buffer = torch.empty(stored.num_bytes, dtype=torch.uint8)
        content = stored.read(self._buffer)
        if target.dtype != piece.dtype:
            content = content.to(piece.dtype)  # rounded twice, as a resident weight is under mixed precision
        target.copy_(content)
