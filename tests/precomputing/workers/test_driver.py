"""The driver of workers: the job that it describes, the receipts that it counts, the error that it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpo_cache
from dpo_cache import errors
from dpo_cache.errors import DpoCacheError, ModelError, OptionError
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.precomputing.audit import AuditTotals
from dpo_cache.precomputing.workers import local, ray_cluster
from dpo_cache.precomputing.workers.driver import workers_device
from dpo_cache.precomputing.workers.job import Failure, Job, Receipt
from dpo_cache.precomputing.workers.worker import Worker
from dpo_cache.store import open_cache
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows

UNITS = {"unit_tokens": "100", "num_workers": 3}


@pytest.fixture
def many_rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "many.jsonl", chat_rows(60))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Workers score in this process, one unit after the other; the jobs that they got."""
    seen: list[Job] = []

    def score_units(job: Job, units: Any, *, log: Any) -> Iterator[Receipt]:
        seen.append(job)
        workers = [Worker(job) for _ in range(2)]
        try:
            for worker, name in zip(workers, "ab", strict=True):
                worker.name = name
            for number, unit in units(3):
                yield workers[number % 2].score(number, unit)
        finally:
            for worker in workers:
                worker.close()

    monkeypatch.setattr(local, "score_units", score_units)
    return seen


def answer(monkeypatch: pytest.MonkeyPatch, *receipts: Receipt) -> list[bool]:
    """Workers return these receipts; the list has an entry once they have ended."""
    ended: list[bool] = []

    def score_units(job: Job, units: Any, *, log: Any) -> Iterator[Receipt]:
        try:
            list(units(3))
            yield from receipts
        finally:
            ended.append(True)

    monkeypatch.setattr(local, "score_units", score_units)
    return ended


def test_a_job_has_no_path_that_depends_on_the_folder_and_no_choice_that_depends_on_the_machine(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model_folder).parent)
    dpo_cache.precompute(Path(model_folder).name, many_rows, "cache", limit=9, num_workers=2)
    (job,) = jobs
    assert (job.options.model, job.options.cache) == (model_folder, str(Path(model_folder).parent / "cache"))
    assert (job.options.dtype, job.options.device, job.options.revision) == ("float32", "cpu", None)
    assert job.run["record"].startswith(f"references/{job.reference_id}/.run-")
    assert job.longest_tokens >= len(job.longest[0][1]) > 10 and job.run_tokens > 100


def test_receipts_are_counted_in_the_report(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job]
) -> None:
    one = dpo_cache.precompute(model_folder, many_rows, tmp_path / "plain")
    progress: list[Any] = []
    many = dpo_cache.precompute(
        model_folder, many_rows, tmp_path / "cache", on_progress=progress.append, **UNITS
    )
    assert many.scored_now == one.scored_now == many.distinct_completions
    assert many.attention == one.attention == "forest" and many.budget_tokens
    assert many.model_tokens == progress[-1].num_tokens == progress[-1].total_tokens
    assert progress[-1].num_completions == many.scored_now and len(progress) > 10
    assert all(entry.elapsed_s > 0 and entry.total_tokens >= entry.num_tokens for entry in progress)
    assert many.audited >= 16 and many.scoring_s > 0 and many.bytes_written > 0
    pairs = [open_cache(tmp_path / name).pairs("many").manifest for name in ("cache", "plain")]
    assert pairs[0]["pairs_digest"] == pairs[1]["pairs_digest"]
    assert not [*(tmp_path / "cache").rglob(".run-*")]


def test_a_stream_is_planned_as_workers_need_units(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job]
) -> None:
    report = dpo_cache.precompute(
        model_folder, many_rows, tmp_path / "cache", streaming=True, window=7, **UNITS
    )
    assert report.scored_now == report.distinct_completions > 0
    assert len(open_cache(tmp_path / "cache").pairs("many")) == 60
    again = dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", streaming=True, **UNITS)
    assert again.scored_now == 0 and not [*(tmp_path / "cache").rglob(".run-*")]


def test_nothing_is_started_where_nothing_is_missing(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job]
) -> None:
    dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache")
    dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", **UNITS)
    dpo_cache.precompute(model_folder, many_rows, tmp_path / "dry", dry_run=True, **UNITS)
    assert not jobs


def test_a_unit_with_two_receipts_counts_once(
    model_folder: str, many_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {"a" * 64 + ".parquet": np.array([b"k" * 16], "S16")}
    receipt = Receipt(0, "a", shards=shards, num_tokens=50, elapsed_s=1.0)
    failed = Receipt(1, "a", failure=Failure("ModelError", "the end"))
    answer(monkeypatch, receipt, receipt, failed)
    seen: list[int] = []
    with pytest.raises(ModelError, match="the end"):
        dpo_cache.precompute(
            model_folder,
            many_rows,
            tmp_path / "cache",
            on_progress=lambda one: seen.append(one.num_tokens),
            **UNITS,
        )
    assert seen == [50]


@pytest.mark.parametrize("kind", ["ModelError", "StorageError", "CacheError", "DpoCacheError"])
def test_a_failure_is_one_error_of_its_kind_after_the_workers_have_ended(
    model_folder: str, many_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    failure = Failure(kind, "row 3: bad.\nDo this.", (3,))
    ended = answer(monkeypatch, Receipt(0, "w", log_file="/tmp/w.log", failure=failure), Receipt(1, "w"))
    with pytest.raises(getattr(errors, kind)) as caught:
        dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", **UNITS)
    assert type(caught.value) is getattr(errors, kind) and ended == [True]
    assert str(caught.value) == "row 3: bad.\nDo this.\n(In worker w. Its log: /tmp/w.log)"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name not in ("format.json",)
                and path.is_file()]  # fmt: skip


def test_wrong_scores_in_one_worker_withdraw_those_of_all(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, num_audited = AuditTotals.add, [0]

    def add(self: AuditTotals, *arguments: Any) -> None:
        num_audited[0] += 1
        if num_audited[0] > 60:
            monkeypatch.setattr("dpo_cache.precomputing.audit.is_beyond_rounding", lambda *_: True)
        real(self, *arguments)

    monkeypatch.setattr(AuditTotals, "add", add)
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", audit="1", **UNITS)
    problem, advice, worker = str(caught.value).splitlines()
    assert "gives other log-probs for row" in problem and worker.startswith("(In worker ")
    withdrawn, _, what = advice.removeprefix("The ").partition(
        " score files and 0 pair sets that this run had "
    )
    assert int(withdrawn) >= 4 and what.startswith("published are withdrawn. Run again with `attention` rows")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["format.json"]


def test_remarks_of_workers_are_logged_once(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.lm.own_forward.fits_into_memory", lambda *_: False)
    report = dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", **UNITS)
    told = [text for text in report.remarks if "the audit leaves out" in text]
    assert told and len(told) == len(set(told))
    assert report.audited == 0 and report.audit_too_long >= len(told)


def test_a_loaded_model_and_a_cache_in_memory_have_no_workers(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job]
) -> None:
    loaded: dict[str, Any] = {"tokenizer": make_tokenizer(), "name": "many", "num_workers": 2}
    with pytest.raises(OptionError, match="workers load the model themselves, and this one is loaded"):
        dpo_cache.precompute(make_llama(), many_rows, tmp_path / "cache", **loaded)
    with pytest.raises(OptionError, match="is in the memory of this process, which workers do not share"):
        dpo_cache.precompute(model_folder, many_rows, "memory://cache", num_workers=2)
    assert not jobs


# -- devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"num_workers": 2}, None),
        ({"ray": "auto", "gpus_per_worker": 0.5}, "cuda"),
        ({"ray": "auto", "gpus_per_worker": 0.0}, "cpu"),
        ({"ray": "auto", "device": "cuda"}, "cuda"),
        ({"ray": "auto", "device": "cpu"}, "cpu"),
        ({"ray": "local"}, "cuda" if torch.cuda.is_available() else "cpu"),
    ],
)
def test_the_device_of_rays_workers_is_known_without_them(
    options: dict[str, Any], expected: str | None
) -> None:
    device = workers_device(PrecomputeOptions(model="m", dataset="d", cache="c", **options))
    assert (device.type if device else None) == expected


def test_a_cluster_that_may_add_gpus_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, float]] = [{"CPU": 16.0}]
    monkeypatch.setattr(ray_cluster, "connected", lambda _: nullcontext())
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: None)
    monkeypatch.setattr(ray_cluster, "node_resources", lambda _: nodes)
    options = PrecomputeOptions(model="m", dataset="d", cache="c", ray="auto", max_workers=32)
    with pytest.raises(OptionError, match="Give `gpus_per_worker` 1, or `device` cpu"):
        workers_device(options)
    assert workers_device(replace(options, max_workers=None)) == torch.device("cpu")
    nodes.append({"CPU": 8.0, "GPU": 1.0})
    assert workers_device(options) == torch.device("cuda")


def test_a_receipt_that_comes_again_does_not_end_the_run(
    model_folder: str, many_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    """Ray scores a unit again whose finished block it has lost."""
    score = local.score_units

    def again(*given: Any, **more: Any) -> Any:
        for receipt in score(*given, **more):
            yield receipt
            yield replace(receipt, failure=Failure("ModelError", "of the second time"))

    monkeypatch.setattr(local, "score_units", again)
    report = dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", **UNITS)
    assert report.scored_now == report.distinct_completions


def test_another_kind_of_error_than_the_tree_has_is_the_base(
    model_folder: str, many_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, Receipt(0, "w", failure=Failure("NoSuchError", "odd")))
    with pytest.raises(DpoCacheError) as caught:
        dpo_cache.precompute(model_folder, many_rows, tmp_path / "cache", **UNITS)
    assert type(caught.value) is DpoCacheError


def test_workers_stream_weights_that_no_device_holds(
    model_folder: str, many_rows: str, tmp_path: Path, jobs: list[Job]
) -> None:
    one = dpo_cache.precompute(model_folder, many_rows, tmp_path / "plain")
    many = dpo_cache.precompute(
        model_folder, many_rows, tmp_path / "cache", stream_weights="on", num_workers=2
    )
    assert (many.scored_now, many.weights_from) == (one.scored_now, "disk")
    assert many.weight_readings >= 2 and many.weight_bytes_read > 0, "of both workers"
    for found, expected in zip(
        open_cache(tmp_path / "cache").pairs("many"),
        open_cache(tmp_path / "plain").pairs("many"),
        strict=True,
    ):
        assert np.abs(found.ref_chosen.token_logps - expected.ref_chosen.token_logps).max() < 3e-5
        assert np.abs(found.ref_rejected.token_logps - expected.ref_rejected.token_logps).max() < 3e-5
