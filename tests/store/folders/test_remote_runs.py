"""precompute and train on a cache in an object store, over a bad network."""

import json
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import StorageError
from dpo_cache.precomputing import units
from tests.store.conftest import plain
from tests.store.object_store import Fault, Proxy

REMOTE = "s3://bucket/runs/cache"


def losses(run: Path) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    ]


def bad_network() -> list[Fault]:
    return [
        Fault("reset", "PUT", "scores"),
        Fault("error", "PUT", "pairs", times=2, status=503, code="SlowDown"),
        Fault("error", "GET", "list-type", times=2),
        Fault("cut", "GET", ".parquet", times=2),
        Fault("reset", "GET", "manifest.json"),
    ]


def test_a_remote_cache_trains_as_a_local_one(
    s3: Proxy, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    local = str(tmp_path / "cache")
    dpo_cache.precompute(model_folder, data_file, local)
    s3.plan += bad_network()
    first = dpo_cache.precompute(model_folder, data_file, REMOTE)
    again = dpo_cache.precompute(model_folder, data_file, REMOTE)
    assert first.scored_now == first.distinct_completions == again.already_cached and again.scored_now == 0
    both = [[plain(pair) for pair in dpo_cache.open_cache(cache).pairs("pairs")] for cache in (local, REMOTE)]
    assert both[0] == both[1]
    for cache, run in ((local, tmp_path / "local"), (REMOTE, tmp_path / "remote")):
        dpo_cache.train(cache, run, batch_size=4, max_steps=3, lr=1e-3)
    assert losses(tmp_path / "local") == losses(tmp_path / "remote")
    assert not [fault for fault in s3.plan if fault.times], "every fault was met"


def test_a_run_whose_store_fails_in_the_middle_is_taken_up(
    s3: Proxy, model_folder: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "FLUSH_S", 0.0)  # a shard a chunk
    s3.plan += [
        Fault("none", "PUT", "scores", times=2),
        Fault("error", "PUT", "scores", times=99, status=403, code="AccessDenied"),
    ]
    with pytest.raises(StorageError, match="AccessDenied"):
        dpo_cache.precompute(model_folder, data_file, REMOTE, budget_tokens="64")
    s3.plan.clear()
    assert dpo_cache.open_cache(REMOTE).pair_sets() == []
    report = dpo_cache.precompute(model_folder, data_file, REMOTE, budget_tokens="64")
    assert report.already_cached > 0
    assert report.already_cached + report.scored_now == report.distinct_completions
    local = str(tmp_path / "cache")
    dpo_cache.precompute(model_folder, data_file, local, budget_tokens="64")
    both = [
        [plain(pair)["completions"] for pair in dpo_cache.open_cache(cache).pairs("pairs")]
        for cache in (local, REMOTE)
    ]
    assert both[0] == both[1]
