"""The environment of each worker on this machine."""

import os

import pytest
import torch

from dpo_cache.errors import OptionError
from dpo_cache.precomputing.workers.environments import worker_environments


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = worker_environments("cuda", 3)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5, GPU-7,GPU-9")
    found = worker_environments("cuda", 2)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["GPU-5", "GPU-7"]
    with pytest.raises(OptionError, match="^`num_workers` 4: there are 3 cuda devices here"):
        worker_environments("cuda", 4)


def test_workers_on_the_cpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [one["OMP_NUM_THREADS"] for one in worker_environments("cpu", 3)] == ["2"] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_environments("cpu", 2)[0]["OMP_NUM_THREADS"] == "5"
