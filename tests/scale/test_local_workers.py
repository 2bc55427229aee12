"""Processes of this machine that fill one cache: the same scores as from one, and one clear error for whatever
goes wrong.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import dpo_cache
from dpo_cache.errors import DataError, DpoCacheError, ModelError
from dpo_cache.precomputing.cutting import MIN_TOKENS
from dpo_cache.precomputing.workers import local
from tests import programs
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.scale import ray_workers as bad_workers
from tests.scale.local_workers import FailsAsItEnds, Forked, WrongLater
from tests.scale.ray_workers import DEADLY_ROW, NOTES, notes
from tests.store.object_store import Proxy, s3, s3_server  # noqa: F401 (fixtures)
from tests.waiting import wait_until

TWO: dict[str, Any] = {"num_workers": 2}
DRIVER = {"DPO_CACHE_PROGRESS": "off", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def processes_import_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", chat_rows(900))


@pytest.fixture(scope="module")
def plain(model: str, data_file: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The cache that one process fills, and its report."""
    cache = tmp_path_factory.mktemp("plain") / "cache"
    return str(cache), dpo_cache.precompute(model, data_file, cache)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers start quickly, as in `programs`, and none is left. Other tests start them as a run does."""
    Forked.started.clear()
    popen = SimpleNamespace(
        Popen=Forked, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    monkeypatch.setattr(local, "subprocess", popen)
    yield
    assert Forked.started and all(one.poll() is not None for one in Forked.started)


def use(worker: type, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local, "Worker", worker)


def values(cache: str) -> dict[tuple[int, bytes], np.ndarray]:
    """The scores of the pair set by row and answer."""
    return {
        (entry.pair.row, side.sequence_ids.tobytes()): score.token_logps
        for entry in dpo_cache.open_cache(cache).pairs("pairs")
        for side, score in (
            (entry.pair.chosen, entry.ref_chosen),
            (entry.pair.rejected, entry.ref_rejected),
        )
    }


def check_equal(cache: str, expected: str) -> None:
    """Both caches hold the same keys, and the same values but for rounding; this one is sound."""
    found, wanted = values(cache), values(expected)
    assert found.keys() == wanted.keys() and len(wanted) > 20
    for key, logps in wanted.items():
        assert np.abs(found[key] - logps).max() <= 1e-4
    one, other = (dpo_cache.open_cache(place).pairs("pairs") for place in (cache, expected))
    assert one.manifest["pairs_digest"] == other.manifest["pairs_digest"]
    assert one.reference_id == other.reference_id
    report = dpo_cache.verify(cache)
    assert not report.problems and not records(cache)


def records(cache: str) -> list[str]:
    folder = dpo_cache.open_cache(cache).folder
    return [
        name
        for reference in folder.names("references")
        for name in folder.hidden_names(f"references/{reference}")
    ]


def child_processes() -> set[int]:
    return {one.pid for one in psutil.Process().children(recursive=True) if "workers.process" in cmdline(one)}


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_two_workers_fill_the_cache_as_one_process_does(
    model: str, data_file: str, plain: tuple[str, Any], tmp_path: Path
) -> None:
    cache, seen, remarks = str(tmp_path / "cache"), [], list[str]()
    report = dpo_cache.precompute(model, data_file, cache, on_progress=seen.append, log=remarks.append, **TWO)
    check_equal(cache, plain[0])
    one = plain[1]
    assert report.missing_tokens > 4 * MIN_TOKENS, "there are several units"
    assert report.num_workers == 2 and report.scored_now == one.scored_now == one.distinct_completions
    assert one.model_tokens <= report.model_tokens <= 1.01 * one.model_tokens
    assert report.audited >= 16 and report.audit_largest_gap < 1e-4, "each worker audits a first sample"
    assert dpo_cache.open_cache(cache).pairs("pairs").manifest["audit"]["completions"] == report.audited
    assert report.loaded_bytes > 0 and report.peak_bytes >= report.loaded_bytes
    assert (report.attention, report.scored_elsewhere) == (one.attention, 0)
    assert [progress.num_workers for progress in seen] == [2] * len(seen) and len(seen) > 4
    assert seen[-1].num_tokens == seen[-1].total_tokens == report.model_tokens
    (remark,) = [text for text in remarks if "each writes a log file" in text]
    logs = Path(remark.rpartition(" in ")[2].partition(" until ")[0])
    assert logs.name.startswith("dpo-cache-workers-") and not logs.exists(), "the run has succeeded"
    assert not child_processes()
    again = dpo_cache.precompute(model, data_file, cache, log=remarks.append, **TWO)
    assert (again.scored_now, again.bytes_written, again.num_workers) == (0, 0, 0)


@pytest.mark.usefixtures("s3", "forked")
def test_workers_that_are_killed_have_their_units_scored_again(
    model: str, data_file: str, plain: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before it publishes, one between publishing and returning; into a cache on S3."""
    use(bad_workers.KilledTwice, monkeypatch)
    cache, remarks = "s3://bucket/cache", list[str]()
    report = dpo_cache.precompute(model, data_file, cache, log=remarks.append, **TWO)
    killed = notes()
    assert len(killed) == 2 and {line.split()[1] for line in killed} == {"before", "after"}
    told = [text for text in remarks if "ended by signal 9 (SIGKILL); another one scores its unit" in text]
    assert len(told) == 2
    assert report.scored_now == report.distinct_completions
    check_equal(cache, plain[0])


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("forked")
def test_a_unit_that_kills_its_workers_ends_the_run_after_three_attempts(
    model: str, few_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(bad_workers.KilledByARow, monkeypatch)
    cache = str(tmp_path / "cache")
    with pytest.raises(DpoCacheError) as caught:
        dpo_cache.precompute(model, few_rows, cache, unit_tokens="100", **TWO)
    assert notes() == ["killed"] * 3
    first, second, *_ = str(caught.value).splitlines()
    found = first.removeprefix("rows ").split(" of pairs/train: ")
    assert str(DEADLY_ROW) in found[0].split(", ")
    assert found[1] == "3 workers that were to score them ended, the last one by signal 9 (SIGKILL)."
    assert "when memory runs out: give fewer `num_workers`" in second
    assert not records(cache)
    report = dpo_cache.precompute(model, few_rows, cache)
    assert report.already_cached + report.scored_now == report.distinct_completions


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (bad_workers.WithoutWeights, "{model}: "),
        (bad_workers.OtherCheckpoint, "this is another model than the run's reference"),
    ],
)
def test_what_a_worker_raises_is_one_error(
    model: str, few_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: type, expected: str
) -> None:
    copied = str(shutil.copytree(model, tmp_path / "model"))
    use(worker, monkeypatch)
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(copied, few_rows, tmp_path / "cache", **TWO)
    text = str(caught.value)
    assert expected.format(model=copied) in text and "Traceback" not in text and len(text.splitlines()) < 12
    assert text.splitlines()[-1].startswith("(In worker ") and "worker-" in text
    assert not dpo_cache.open_cache(tmp_path / "cache").references()


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("forked")
def test_a_row_without_finite_log_probs_is_named(tmp_path: Path) -> None:
    broken, tokenizer = make_llama(), make_tokenizer()
    broken.get_input_embeddings().weight.data[tokenizer.encode("~")[0]] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = chat_rows(12)
    rows[5]["chosen"] = [{"role": "assistant", "content": "red ~~~"}]
    with pytest.raises(ModelError, match=r"NaN or infinite for row 5[^0-9]"):
        dpo_cache.precompute(
            tmp_path / "model", write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "c", **TWO
        )


@pytest.mark.usefixtures("forked")
def test_a_worker_that_fails_as_it_is_ended_does_not_delay_the_error(
    model: str, few_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FailsAsItEnds, monkeypatch)
    started = time.monotonic()
    with pytest.raises(DataError, match="a problem"):
        dpo_cache.precompute(model, few_rows, tmp_path / "cache", unit_tokens="100", **TWO)
    assert time.monotonic() - started < local.STOP_S / 2


@pytest.mark.usefixtures("forked")
def test_a_failed_audit_withdraws_what_all_workers_published(
    model: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(WrongLater, monkeypatch)
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(model, data_file, tmp_path / "cache", audit="20", **TWO)
    assert "gives other log-probs for row" in str(caught.value)
    published = int(str(caught.value).partition("\nThe ")[2].partition(" score files and 0 pair sets")[0])
    assert published >= 2, "of two workers"
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["format.json"]


def start_driver(model: str, data_file: str, cache: Path, *more: str) -> programs.Program:
    command = ["precompute", "--model", model, "--dataset", data_file, "--cache", str(cache), "--json"]
    script = f"import os\nos.environ.update({DRIVER!r})\nfrom dpo_cache.cli.app import main\nmain()\n"
    return programs.start(*command, *more, script=script)


def wait_for_shards(driver: programs.Program, cache: Path, count: int) -> set[psutil.Process]:
    """Wait for so many score shards; returns the driver's workers."""
    workers: set[psutil.Process] = set()

    def has_published() -> bool:
        assert not driver.has_ended(), driver.wait()
        workers.update(one for one in psutil.Process(driver.pid).children() if "process" in cmdline(one))
        return len([*cache.glob("references/*/scores/*")]) >= count

    wait_until(has_published, f"{count} shards")
    assert len(workers) == 2
    return workers


def all_ended(workers: set[psutil.Process]) -> Callable[[], bool]:
    return lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers)


def test_a_driver_that_is_killed_leaves_no_worker_and_is_run_again(
    model: str, data_file: str, plain: tuple[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    driver = start_driver(model, data_file, cache, "--num-workers", "2", "--unit-tokens", "500")
    workers = wait_for_shards(driver, cache, 4)
    driver.kill()
    wait_until(all_ended(workers), "the end of the workers", limit_s=60)
    report = dpo_cache.precompute(model, data_file, cache)
    assert report.already_cached > 0 and report.scored_now > 0
    check_equal(str(cache), plain[0])


def test_ctrl_c_keeps_what_was_scored_and_ends_the_workers(
    model: str, data_file: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    driver = start_driver(model, data_file, cache, "--num-workers", "2", "--unit-tokens", "500")
    workers = wait_for_shards(driver, cache, 4)
    driver.send_signal(signal.SIGINT)
    end = driver.wait(90)
    assert end.code == 130 and "Traceback" not in end.err
    assert all_ended(workers)() and not records(str(cache))
    scores = dpo_cache.open_cache(cache).scores(dpo_cache.open_cache(cache).references()[0])
    assert len(scores) > 0


@pytest.mark.rotating(2)
def test_two_runs_begun_by_hand_share_the_work(
    model: str, data_file: str, plain: tuple[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    drivers = [start_driver(model, data_file, cache, "--unit-tokens", "500") for _ in range(2)]
    reports = []
    for driver in drivers:
        end = driver.wait()
        assert end.code == 0, end.err
        reports.append(json.loads(end.out))
    distinct = plain[1].distinct_completions
    assert all(report["already_cached"] < distinct / 2 for report in reports), "they ran at the same time"
    assert all(
        report["already_cached"] + report["scored_now"] + report["scored_elsewhere"] == distinct
        for report in reports
    )
    assert sum(report["scored_now"] for report in reports) <= 1.25 * distinct
    check_equal(str(cache), plain[0])
