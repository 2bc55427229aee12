"""The memory that is left, also within the limit of a container."""

from pathlib import Path

import psutil
import pytest
import torch

from dpo_cache.lm.free_memory import free_bytes, free_host_bytes, total_host_bytes

V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
V2 = ("memory.max", "memory.current", "memory.stat")


@pytest.mark.parametrize("names", [V1, V2])
def test_the_limit_of_a_container_counts_and_memory_of_files_can_be_freed(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for name, text in zip(names, ("3000", "2500", "anon 1500\ninactive_file 800\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == 3000 - 2500 + 800
    assert total_host_bytes(tmp_path) == 3000
    (tmp_path / names[0]).write_text("1000")
    assert free_host_bytes(tmp_path) == 0


@pytest.mark.parametrize("limit", ["max", "not a number", str(2**63)])
def test_without_a_limit_it_is_that_of_the_host(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000, "total": 9000})
    )
    for name, text in zip(V2, (limit, "2500", "inactive_file 0"), strict=True):
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == free_host_bytes(tmp_path / "none") == 5000
    assert total_host_bytes(tmp_path) == total_host_bytes(tmp_path / "none") == 9000
    assert free_bytes(torch.device("cpu")) <= 5000
