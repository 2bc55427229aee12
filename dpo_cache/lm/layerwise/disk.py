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
