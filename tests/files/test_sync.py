"""Waiting for the disk, with the flags that each system needs."""

import os
from pathlib import Path

import pytest

from dpo_cache.files import sync as module
from dpo_cache.files.sync import sync


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    (tmp_path / "file").write_text("x")
    sync(tmp_path / "file")
    sync(tmp_path)
    assert len(synced) == 2


def test_windows_syncs_files_that_are_open_for_writing_and_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    flags: list[int] = []
    real = os.open

    def record(path: Path, flag: int) -> int:
        flags.append(flag)
        return real(path, flag)

    monkeypatch.setattr(module.os, "open", record)
    monkeypatch.setattr(module.os, "name", "nt")
    sync(tmp_path)
    assert flags == []
    sync(file)
    monkeypatch.setattr(module.os, "name", "posix")
    sync(file)
    assert flags == [os.O_RDWR, os.O_RDONLY]
