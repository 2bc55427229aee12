"""Shards of tensors -> whole tensors in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_cache.training.output import whole
from dpo_cache.training.output.whole import MappedTensors, Shard, TensorsFile, gathered_bytes
from dpo_cache.training.ranks import Ranks

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).view(7, 5),
    "few rows": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "rest": torch.arange(-8, 5, dtype=torch.int16),
    "stack": torch.rand(4, 3, 2),
    "no columns": torch.empty(3, 0),
    "step": torch.tensor(4.0),
    "count": torch.tensor(7),
}


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, index: int, size: int, shared: dict[int, Any], barrier: Barrier):
        self.index, self.size, self._shared, self._barrier = index, size, shared, barrier

    def collect(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self.index] = tensor.clone()
        self._barrier.wait(30)
        found = [self._shared[rank] for rank in range(self.size)] if self.is_main else []
        self._barrier.wait(30)
        return found


def shard_of(tensor: torch.Tensor, rank: int, size: int) -> Shard | torch.Tensor:
    """The rows that FSDP2 gives to a rank."""
    if not tensor.ndim:
        return tensor
    rows = tensor.chunk(size)[rank] if rank < len(tensor.chunk(size)) else tensor[:0]
    return Shard(rows, tuple(tensor.shape))


def gather(size: int, write: Any, tensors: Mapping[str, torch.Tensor] = TENSORS) -> None:
    """Call `write` with each part on the main rank."""
    shared, barrier = dict[int, Any](), Barrier(size)

    def run(rank: int) -> None:
        shards = {name: shard_of(tensor, rank, size) for name, tensor in tensors.items()}
        for part in gathered_bytes(shards, Threads(rank, size, shared, barrier)):
            write(*part)

    others = [Thread(target=run, args=(rank,)) for rank in range(1, size)]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()


def shards_on_main(size: int) -> dict[str, Shard | torch.Tensor]:
    return {name: shard_of(tensor, 0, size) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("slab", [8, 24, 2**20])
def test_the_file_has_the_whole_tensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, slab: int
) -> None:
    monkeypatch.setattr(whole, "SLAB", slab)
    file = TensorsFile(tmp_path / "state.safetensors", shards_on_main(size))
    gather(size, file.write)
    file.close()
    found = load_file(tmp_path / "state.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize("size", [1, 3])
def test_mapped_tensors_are_the_whole_ones_and_share_no_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    monkeypatch.setattr(whole, "SLAB", 8)
    mapped = MappedTensors(tmp_path / "whole", shards_on_main(size))
    gather(size, mapped.write)
    found = mapped.tensors()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert len({found[name].untyped_storage().data_ptr() for name in TENSORS}) == len(TENSORS)


def test_only_a_slab_of_each_rank_is_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(whole, "SLAB", 64)
    sizes = list[int]()
    gather(2, lambda _, __, part: sizes.append(part.numel()), {"large": torch.rand(100, 10)})
    assert max(sizes) == 64 and sum(sizes) == 4000
