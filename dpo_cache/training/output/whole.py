"""Shards of tensors on all ranks -> complete tensors in files, which the main rank writes.

A shard is sent in slabs of `SLAB` bytes, which the main rank writes to their places: it never holds a
complete tensor. All ranks call these functions, with the same names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from dpo_cache.lm.model.stored_tensors import DTYPES, LENGTH_BYTES
from dpo_cache.lm.sharded import LocalShard, local_rows
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.ranks import Ranks

if TYPE_CHECKING:
    from peft import PeftModel

SLAB = 2**25  # bytes of each rank at once
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a tensor; every rank but the last ones has equally many."""

    rows: torch.Tensor
    shape: tuple[int, ...]  # shape of the complete tensor

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.rows.dtype.itemsize


Sharded = Mapping[str, Shard | torch.Tensor]  # a plain tensor is the same on all ranks


def shards_of_policy(policy: TrainedModel, ranks: Ranks) -> tuple[Sharded, dict[str, str]]:
    """The tensors of a policy to save, each once, and for each name the first name of its tensor.

    For a policy with an adapter, they are those that PEFT saves.
    """
    whole: Any = policy.model if policy.adapted is None else policy.adapted
    state: dict[str, torch.Tensor] = whole.state_dict(keep_vars=True)
    if policy.adapted is not None:
        chosen = ranks.share(_saved_names(policy.adapted, state) if ranks.is_main else [])
        state = {name: state[name] for name in chosen}
    firsts: dict[int, str] = {}
    names = {name: firsts.setdefault(id(tensor), name) for name, tensor in state.items()}
    return {first: _shard_of(state[first]) for first in firsts.values()}, names


def shards_of_optimizer(optimizer: Updater, shards: Mapping[str, LocalShard]) -> Sharded:
    """The optimizer's state, see `Updater.tensors`."""
    found: dict[str, Shard | torch.Tensor] = {}
    for name, tensor in optimizer.tensors().items():
        shape = tuple(shards[name.rpartition("/")[0]].shape)
        found[name] = Shard(tensor, shape) if tensor.ndim else tensor
    return found


def _saved_names(adapted: PeftModel, state: dict[str, torch.Tensor]) -> list[str]:
    """The names, in the state, of the tensors that PEFT saves for an adapter."""
    from peft import get_peft_model_state_dict

    saved = {id(tensor) for tensor in get_peft_model_state_dict(adapted, state_dict=state).values()}
    return [name for name, tensor in state.items() if id(tensor) in saved or tensor.requires_grad]


def _shard_of(tensor: torch.Tensor) -> Shard | torch.Tensor:
    rows = local_rows(tensor.detach())
    return rows if type(tensor.data) is torch.Tensor else Shard(rows, tuple(tensor.shape))


def gathered_bytes(tensors: Sharded, ranks: Ranks) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield the tensors' bytes on the main rank: a name, the number of the first byte, and a uint8 tensor on
    the CPU. The other ranks yield nothing, but must iterate as well.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Shard):
            yield from ((name, start, part) for start, part in _gather(tensor, ranks))
        elif ranks.is_main:
            yield name, 0, _bytes_of(tensor).cpu()


def _gather(shard: Shard, ranks: Ranks) -> Iterator[tuple[int, torch.Tensor]]:
    content, per_row = _bytes_of(shard.rows), math.prod(shard.shape[1:]) * shard.rows.dtype.itemsize
    per_rank = -(-shard.shape[0] // ranks.size) * per_row
    for offset in range(0, per_rank, SLAB):
        slab = content.new_zeros(min(SLAB, per_rank - offset))
        own = content[offset : offset + SLAB]
        slab[: len(own)] = own
        for rank, found in enumerate(ranks.collect(slab)):
            start = rank * per_rank + offset
            stop = min(start + len(slab), shard.num_bytes)
            if start < stop:
                yield start, found[: stop - start].cpu()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class TensorsFile:
    """A safetensors file whose tensors are written in parts, in any order."""

    def __init__(self, path: Path, tensors: Sharded):
        header, end = {}, 0
        self._starts: dict[str, int] = {}
        for name, tensor in tensors.items():
            rows = tensor.rows if isinstance(tensor, Shard) else tensor
            begin, end = end, end + (tensor.num_bytes if isinstance(tensor, Shard) else tensor.nbytes)
            entry = {"dtype": NAMES[rows.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            header[name], self._starts[name] = entry, begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._begin = LENGTH_BYTES + len(text)
        self._file: IO[bytes] = path.open("wb")
        self._file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        self._file.truncate(self._begin + end)

    def write(self, name: str, start: int, content: torch.Tensor) -> None:
        """Write bytes of a tensor from number `start` on."""
        self._file.seek(self._begin + self._starts[name] + start)
        self._file.write(memoryview(content.numpy()))  # type: ignore[arg-type]

    def close(self) -> None:
        self._file.close()


class MappedTensors:
    """Tensors in files of a folder, mapped into memory, whose pages the system can drop at any time."""

    def __init__(self, folder: Path, tensors: Sharded):
        folder.mkdir()
        self._entries = {
            name: (
                folder / f"{number}.bin",
                tuple(tensor.shape),
                (tensor.rows if isinstance(tensor, Shard) else tensor).dtype,
            )
            for number, (name, tensor) in enumerate(tensors.items())
        }

    def write(self, name: str, start: int, content: torch.Tensor) -> None:
        """Write bytes of a tensor from number `start` on."""
        path = self._entries[name][0]
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(start)
            file.write(memoryview(content.numpy()))  # type: ignore[arg-type]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, once they are written."""
        return {
            name: torch.from_file(
                str(path), shared=False, size=math.prod(shape) * dtype.itemsize, dtype=torch.uint8
            )
            .view(dtype)
            .view(shape)
            if math.prod(shape)
            else torch.empty(shape, dtype=dtype)
            for name, (path, shape, dtype) in self._entries.items()
        }
