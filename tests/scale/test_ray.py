"""Precompute on Ray: the same cache as from one process, and one clear error for whatever goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

import dpo_cache
from dpo_cache.errors import DpoCacheError, ModelError, OptionError
from dpo_cache.precomputing.workers import ray as ray_workers
from dpo_cache.precomputing.workers.ray_cluster import connected
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.scale import ray_workers as bad_workers
from tests.scale.ray_workers import DEADLY_ROW, NOTES, notes
from tests.store.object_store import Proxy, s3, s3_server  # noqa: F401 (fixtures)
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'dpo-cache[ray]'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of its own settings
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # files that it leaves open
]

RAY = {"ray": "local", "num_workers": 2, "cpus_per_worker": 1}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", chat_rows(700))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: Proxy) -> Iterator[None]:
    """A cluster on this machine for the tests of this file, whose workers can import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NOTES, str(tmp_path_factory.mktemp("notes")))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("AWS_ENDPOINT_URL", s3_server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1" if "REGION" in name else "test")
        with connected("local"):
            yield


def values(cache: str, name: str = "pairs") -> dict[tuple[int, bytes], np.ndarray]:
    """The scores of a pair set by row and answer."""
    return {
        (entry.pair.row, side.sequence_ids.tobytes()): score.token_logps
        for entry in dpo_cache.open_cache(cache).pairs(name)
        for side, score in (
            (entry.pair.chosen, entry.ref_chosen),
            (entry.pair.rejected, entry.ref_rejected),
        )
    }


def assert_equal_caches(cache: str, expected: str) -> None:
    found, wanted = values(cache), values(expected)
    assert found.keys() == wanted.keys() and len(wanted) > 10
    for key, logps in wanted.items():
        np.testing.assert_allclose(found[key], logps, atol=1e-4)
    digests = {dpo_cache.open_cache(one).pairs("pairs").manifest["pairs_digest"] for one in (cache, expected)}
    assert len(digests) == 1
    assert dpo_cache.verify(cache).is_whole


@pytest.mark.usefixtures("cluster")
def test_two_workers_fill_the_cache_as_one_process_does(model: str, data_file: str, tmp_path: Path) -> None:
    plain = dpo_cache.precompute(model, data_file, tmp_path / "plain")
    remarks = list[str]()
    report = dpo_cache.precompute(
        model, data_file, tmp_path / "ray", unit_tokens="8192", log=remarks.append, **RAY
    )
    assert_equal_caches(str(tmp_path / "ray"), str(tmp_path / "plain"))
    assert report.num_workers == 2 and report.scored_now == plain.scored_now
    assert plain.model_tokens <= report.model_tokens <= 1.01 * plain.model_tokens
    assert report.missing_tokens > 3 * 8192, "there are several units"
    assert [line for line in remarks if "2 workers with 1 CPU each on Ray" in line]
    assert not [*(tmp_path / "ray").rglob(".run-*")]


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("cluster")
def test_workers_killed_before_and_after_publishing_to_s3(
    model: str,
    data_file: str,
    tmp_path: Path,
    s3: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_workers, "Worker", bad_workers.KilledTwice)
    report = dpo_cache.precompute(model, data_file, "s3://bucket/cache", unit_tokens="8192", **RAY)
    killed = notes()
    assert sorted(line.split()[:3] for line in killed) == [
        ["killed", "after", "publishing"],
        ["killed", "before", "publishing"],
    ]
    assert report.scored_now == report.distinct_completions
    dpo_cache.precompute(model, data_file, tmp_path / "plain")
    assert_equal_caches("s3://bucket/cache", str(tmp_path / "plain"))
    again = dpo_cache.precompute(model, data_file, "s3://bucket/cache")
    assert again.scored_now == 0


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("cluster")
def test_a_unit_that_kills_its_worker_ends_the_run_after_three_attempts(
    model: str, few_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "Worker", bad_workers.KilledByARow)
    with pytest.raises(DpoCacheError) as caught:
        dpo_cache.precompute(model, few_rows, tmp_path / "cache", unit_tokens="200", **RAY)
    assert notes() == ["killed"] * 3
    first, *_ = str(caught.value).splitlines()
    assert first.endswith("of pairs/train: 3 workers that were to score them ended.")
    assert str(DEADLY_ROW) in first.removeprefix("rows ").split(" of ")[0].split(", ")


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (bad_workers.WithoutWeights, "model: "),
        (bad_workers.OtherCheckpoint, "this is another model than the run's reference"),
    ],
)
def test_what_a_worker_raises_is_one_error(
    model: str, few_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: type, expected: str
) -> None:
    copied = shutil.copytree(model, tmp_path / "model")
    monkeypatch.setattr(ray_workers, "Worker", worker)
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(copied, few_rows, tmp_path / "cache", **{**RAY, "num_workers": 1})
    assert expected in str(caught.value) and "Traceback" not in str(caught.value)
    assert len(str(caught.value).splitlines()) < 12
    assert not dpo_cache.open_cache(tmp_path / "cache").references()


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("cluster")
def test_a_row_without_finite_log_probs_is_named(few_rows: str, tmp_path: Path) -> None:
    broken, tokenizer = make_llama(), make_tokenizer()
    broken.get_input_embeddings().weight.data[tokenizer.encode("~")[0]] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = chat_rows(12)
    rows[6]["chosen"][0]["content"] += "~~~"
    data_file = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ModelError, match=r"NaN or infinite for row 6[^0-9]"):
        dpo_cache.precompute(tmp_path / "model", data_file, tmp_path / "cache", **RAY)


@pytest.mark.rotating(2)
@pytest.mark.usefixtures("cluster")
def test_a_reference_spread_over_devices_in_a_worker(model: str, few_rows: str, tmp_path: Path) -> None:
    one = {**RAY, "num_workers": 1}
    report = dpo_cache.precompute(model, few_rows, tmp_path / "ray", device_map="auto", **one)
    dpo_cache.precompute(model, few_rows, tmp_path / "plain")
    assert_equal_caches(str(tmp_path / "ray"), str(tmp_path / "plain"))
    assert any("the model is spread" in line for line in report.remarks)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_fit_are_refused_at_once(model: str, few_rows: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="90 workers with 1 CPU each do not fit on this machine, which has"):
        dpo_cache.precompute(model, few_rows, tmp_path / "cache", **{**RAY, "num_workers": 90})
    with pytest.raises(OptionError, match="1 worker with 1 GPU and 1 CPU each do not fit"):
        dpo_cache.precompute(
            model,
            few_rows,
            tmp_path / "cache",
            ray="local",
            num_workers=1,
            gpus_per_worker=1,
            cpus_per_worker=1,
        )


@pytest.mark.rotating(2)
def test_a_killed_driver_leaves_no_worker_and_its_scores(model: str, data_file: str, tmp_path: Path) -> None:
    cache, environment = tmp_path / "cache", {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "dpo_cache", "precompute", "--model", model, "--dataset", data_file]
    command += ["--cache", str(cache), "--ray", "local", "--num-workers", "2", "--cpus-per-worker", "1"]
    driver = subprocess.Popen([*command, "--unit-tokens", "200"], env=environment, stderr=subprocess.PIPE)
    try:
        seen: dict[int, psutil.Process] = {}

        def has_published() -> bool:
            seen.update({one.pid: one for one in psutil.Process(driver.pid).children(recursive=True)})
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            return len([*cache.glob("references/*/scores/*")]) >= 3

        wait_until(has_published, "3 shards")
        assert listening(seen.values()) <= LOOPBACK, "Ray listens on this machine only"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        try:
            wait_until(lambda: not alive(seen.values()), "the end of Ray's processes", limit_s=60)
        except AssertionError as error:
            raise AssertionError(f"{error}: {alive(seen.values())}") from error
    finally:
        for one in seen.values():
            with suppress(psutil.NoSuchProcess):
                one.kill()
    report = dpo_cache.precompute(model, data_file, cache)
    assert report.already_cached > 0 and report.scored_now < report.distinct_completions
    dpo_cache.precompute(model, data_file, tmp_path / "plain")
    assert_equal_caches(str(cache), str(tmp_path / "plain"))


def alive(processes: Iterable[psutil.Process]) -> list[str]:
    """The command lines of those that have not ended, without Ray's two agents: they wait for the rest of Ray,
    and end after a minute or two.
    """
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return [one for one in found if not re.search(r"ray::\w+Agent\b|agent/main\.py|dashboard/agent\.py", one)]


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """The addresses on which these processes listen."""
    found = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return found
