"""Weights of layers from a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.layerwise.conversion import Piece
from dpo_cache.lm.layerwise.held import Layout, Place
from dpo_cache.lm.model.stored_tensors import StoredTensor, StoredTensors


class DiskWeights:
    """Reads a layer's tensors each time, and converts them as `from_pretrained` does: the same bits.

    `pieces` are those of each layer, and `names` the names that the tensors had when the model was loaded, by
    the id of what is in their place without values; an adapter gives modules other names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: StoredTensors,
        pieces: Sequence[Sequence[Piece]],
        names: Mapping[int, str],
    ):
        self._model, self._stored, self._pieces, self._names = model, stored, pieces, names
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes_read(self) -> int:
        """From the files, so far."""
        return self._stored.num_bytes_read

    def close(self) -> None:
        self._stored.close()

    @torch.no_grad()
    def fill(self, index: int, layout: Layout, flat: torch.Tensor) -> None:
        places = dict[str, list[Place]]()
        for place in layout.places:
            name = self._names.get(id(place.held.tensor))
            if name is None:
                place.view(flat).copy_(place.held.tensor)
            else:
                places.setdefault(name, []).append(place)
        for piece in self._pieces[index]:
            self._fill(piece, places, flat)
        assert not places, f"not in the files: {list(places)}"

    def _fill(self, piece: Piece, places: dict[str, list[Place]], flat: torch.Tensor) -> None:
        if piece.converter is None and self._read_in_place(piece, places.get(piece.target, []), flat):
            del places[piece.target]
            return
        made = piece.convert(self._model, self._read if piece.converter is None else StoredTensor.read)
        for name in [*made]:
            for place in places.pop(name, []):
                place.view(flat).copy_(made[name])
            del made[name]

    def _read_in_place(self, piece: Piece, places: list[Place], flat: torch.Tensor) -> bool:
        """Read without a buffer between, where the stored bytes are those of the copy."""
        ((_, _, stored),) = piece.sources
        if len(places) != 1 or {piece.dtype, places[0].dtype} != {stored.dtype}:
            return False
        view = places[0].view(flat)
        if not view.is_contiguous() or not stored.num_bytes:
            return False
        stored.read(view.view(-1).view(torch.uint8))
        return True

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        """In a buffer that serves one tensor after the other."""
        if self._buffer.numel() < stored.num_bytes:
            self._buffer = torch.empty(stored.num_bytes, dtype=torch.uint8)
        return stored.read(self._buffer)
