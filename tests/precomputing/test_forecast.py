"""A dry run ends with time, memory and disk."""

from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.planning import scoring_forecast as planned
from dpo_cache.planning.disk import BYTES_PER_TOKEN
from dpo_cache.planning.ways import PROCESS_BYTES
from dpo_cache.precomputing import forecast as module
from tests.conftest import make_llama


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "measure_tflops", lambda device: 1e-6)


def test_a_dry_run_predicts_the_run(model_folder: str, data_file: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    report = dpo_cache.precompute(model_folder, data_file, cache, dry_run=True)
    found = report.forecast
    assert found is not None and found.device == "cpu" and found.seconds
    weights = sum(one.nbytes for one in make_llama().parameters())
    assert found.device_bytes > PROCESS_BYTES + weights
    assert found.disk_bytes == BYTES_PER_TOKEN * report.data_tokens and found.free_disk_bytes > 0
    half = dpo_cache.precompute(model_folder, data_file, cache, dry_run=True, limit=6).forecast
    assert half is not None and 0 < half.seconds < found.seconds and half.disk_bytes < found.disk_bytes
    real = dpo_cache.precompute(model_folder, data_file, cache)
    assert real.forecast is None
    assert real.bytes_written < found.disk_bytes + 20_000  # of files for so few tokens, most are headers


def test_of_a_run_whose_scores_are_cached_nothing_is_left(
    model_folder: str, data_file: str, tmp_path: Path
) -> None:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    found = dpo_cache.precompute(model_folder, data_file, tmp_path / "cache", dry_run=True).forecast
    assert found is not None and (found.seconds, found.device_bytes) == (0.0, 0)


def test_the_speed_of_a_cluster_is_a_usual_one(model_folder: str, data_file: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    options = {"dry_run": True, "ray": "local", "device": "cpu"}
    one, two = (
        dpo_cache.precompute(
            model_folder, data_file, tmp_path / "cache", num_workers=number, **options
        ).forecast
        for number in (1, 2)
    )
    assert one is not None and two is not None and one.seconds == pytest.approx(2 * two.seconds)
    assert one.source == "at a speed that is usual for a cpu device"


def test_a_model_that_cannot_be_counted_is_said(
    model_folder: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise RuntimeError("needs a value")

    monkeypatch.setattr(module, "scoring_bytes", fail)
    report = dpo_cache.precompute(model_folder, data_file, tmp_path / "cache", dry_run=True)
    assert report.forecast is not None and report.forecast.seconds is None
    assert any("memory and time cannot be predicted (needs a value)" in remark for remark in report.remarks)
