"""A worker: it verifies the checkpoint, scores, audits and publishes; whatever fails is in its receipt."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cache.lm import runner
from dpo_cache.lm.model import tensor_digest
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.precomputing.inputs import Inputs, read_config
from dpo_cache.precomputing.reference import identify_reference
from dpo_cache.precomputing.units import Unit, take
from dpo_cache.precomputing.workers.job import Job, Receipt, rows_of
from dpo_cache.precomputing.workers.worker import Worker
from dpo_cache.store import completion_key, open_cache
from dpo_cache.store.upkeep.run_record import RunRecord
from tests.conftest import make_completions, make_llama, naive_token_logps


@pytest.fixture
def model(model_folder: str, tmp_path: Path) -> str:
    """A copy that a test may change."""
    return str(shutil.copytree(model_folder, tmp_path / "model"))


def make_unit() -> Unit:
    distinct = {completion_key(one): one for one in make_completions()}
    return Unit(
        [*distinct], [*distinct.values()], [[row] for row in range(len(distinct))], 190, "pairs/train"
    )


def describe_job(model: str, cache: Path, record: RunRecord | None = None, **options: Any) -> Job:
    """A job as the driver describes it; without a record, its run is not begun."""
    chosen = PrecomputeOptions(
        model=model, dataset="rows", cache=str(cache), dtype="float32", device="cpu", **options
    )
    inputs = Inputs(chosen)
    reference = identify_reference(inputs, read_config(inputs), "tokenizer", print)
    record = record or RunRecord(open_cache(cache, create=True), reference.id)
    return Job(
        chosen, reference.id, reference.identity, reference.provenance, 60, 190, [], record.for_workers()
    )


def score_once(job: Job, unit: Unit, number: int = 0) -> Receipt:
    """The receipt of a worker that scores one unit."""
    with closing(Worker(job)) as worker:
        return worker.score(number, unit)


def scores_of(cache: Path, reference: str, keys: list[bytes]) -> list[Any]:
    return open_cache(cache).scores(reference).fetch(keys)


def test_a_unit_is_in_the_cache_when_its_receipt_is_returned(model: str, tmp_path: Path) -> None:
    job, unit = describe_job(model, tmp_path / "cache"), make_unit()
    worker = Worker(pickle.loads(pickle.dumps(job)))
    first, second = take(unit, range(10)), take(unit, range(10, len(unit)))
    receipts = [worker.score(4, first), worker.score(7, second)]
    worker.close()
    assert [receipt.number for receipt in receipts] == [4, 7]
    for receipt, part in zip(receipts, (first, second), strict=True):
        assert receipt.failure is None and receipt.num_completions == len(part)
        assert sorted(b for keys in receipt.shards.values() for b in keys.tolist()) == sorted(
            np.array(part.keys).tolist()
        )
        assert receipt.num_tokens == part.planned_tokens and receipt.bytes_written > 0
        for key, completion, score in zip(
            part.keys,
            part.completions,
            scores_of(tmp_path / "cache", job.reference_id, part.keys),
            strict=True,
        ):
            expected = naive_token_logps(make_llama(), completion).numpy()
            assert np.abs(score.token_logps - expected).max() < 3e-5, key.hex()
    assert receipts[0].load_s > 0 == receipts[1].load_s, "the model is loaded once"
    assert receipts[0].audited and receipts[1].audited
    assert receipts[1].audited.completions >= receipts[0].audited.completions >= 8
    entry = open_cache(tmp_path / "cache").read_reference(job.reference_id)
    assert entry["identity"] == job.identity and entry["provenance"] == job.provenance


def test_a_unit_that_is_scored_again_is_the_same_shard(model: str, tmp_path: Path) -> None:
    job, unit = describe_job(model, tmp_path / "cache"), make_unit()
    one, other = (score_once(job, unit) for _ in range(2))
    assert one.shards.keys() == other.shards.keys()
    assert len([*(tmp_path / "cache").glob("references/*/scores/*.parquet")]) == 1


def test_a_worker_reads_no_key_of_the_cache(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an index was opened")

    monkeypatch.setattr("dpo_cache.store.index.ScoreIndex.__init__", refuse)
    assert score_once(describe_job(model, tmp_path / "cache"), make_unit()).failure is None


def test_another_checkpoint_under_the_same_path_is_refused(model: str, tmp_path: Path) -> None:
    job = describe_job(model, tmp_path / "cache")
    make_llama(seed=1).save_pretrained(model)
    failure = score_once(job, make_unit()).failure
    assert failure and failure.kind == "ModelError" and not failure.withdraws
    assert f"this is another model than the run's reference {job.reference_id[:12]}; they differ in" in (
        failure.message
    )
    assert "\n  weights: " in failure.message
    assert not open_cache(tmp_path / "cache").references()


def test_a_checkpoint_that_changes_after_it_was_verified_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = describe_job(model, tmp_path / "cache")
    real = runner.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        make_llama(seed=1).save_pretrained(model)
        return real(*arguments, **options)

    monkeypatch.setattr(runner, "load_model", load)
    failure = score_once(job, make_unit()).failure
    assert failure and "was changed while the model was read" in failure.message


def test_the_weights_are_hashed_once_for_all_workers_of_a_machine(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, hashed = describe_job(model, tmp_path / "cache"), list[str]()
    real = tensor_digest.tensor_entry
    monkeypatch.setattr(
        tensor_digest, "tensor_entry", lambda tensor, dtype: (hashed.append(dtype), real(tensor, dtype))[1]
    )
    for _ in range(2):
        assert score_once(job, make_unit()).failure is None
    assert not hashed, "the driver had hashed them on this machine"


def test_a_cache_that_is_not_the_drivers_is_refused(model: str, tmp_path: Path) -> None:
    """As on a machine where the path names another folder."""
    job = describe_job(model, tmp_path / "cache")
    elsewhere = replace(job, options=replace(job.options, cache=str(tmp_path / "elsewhere")))
    failure = score_once(elsewhere, make_unit()).failure
    assert failure and failure.kind == "CacheError"
    assert "this is not the cache of the run: it lacks the run's record" in failure.message
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("error", [RuntimeError("device lost\nmore"), ValueError("odd"), MemoryError()])
def test_any_error_is_a_receipt_that_names_rows(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job, unit = describe_job(model, tmp_path / "cache"), make_unit()
    real = runner.score_completions

    def fail(given_model: Any, completions: Any, *rest: Any) -> Iterator[Any]:
        if len(completions) == len(unit):
            raise error
        yield from real(given_model, completions, *rest)

    monkeypatch.setattr(runner, "score_completions", fail)
    receipt = score_once(job, unit, 3)
    assert receipt.number == 3 and receipt.failure and receipt.failure.kind == "DpoCacheError"
    assert receipt.failure.message.startswith("rows 0, 1, 2, 3, 4, 5, 6, 7, … of pairs/train: ")
    assert receipt.failure.message.endswith((": device lost", ": odd", ": MemoryError"))
    assert receipt.failure.rows == rows_of(unit) == tuple(range(len(unit)))


def test_a_load_that_fails_is_a_receipt(model: str, tmp_path: Path) -> None:
    job = describe_job(model, tmp_path / "cache")
    Path(model, "model.safetensors").unlink()
    failure = score_once(job, make_unit()).failure
    assert failure and failure.kind == "ModelError" and model in failure.message


def test_scores_from_before_an_error_are_published(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, unit = describe_job(model, tmp_path / "cache", audit="off", budget_tokens="32"), make_unit()
    real = runner.score_completions

    def fail(given_model: Any, completions: Any, *rest: Any) -> Iterator[Any]:
        for number, step in enumerate(real(given_model, completions, *rest)):
            if number == 3 and len(completions) == len(unit):
                raise RuntimeError("device lost")
            yield step

    monkeypatch.setattr(runner, "score_completions", fail)
    receipt = score_once(job, unit)
    assert receipt.failure and 0 < receipt.num_completions < len(unit)
    keys = [
        key for key in unit.keys if open_cache(tmp_path / "cache").scores(job.reference_id).contains([key])
    ]
    assert len(keys) == receipt.num_completions


def test_wrong_scores_withdraw(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    with RunRecord(open_cache(cache, create=True), _id_of(model)) as record:
        job, unit = describe_job(model, cache, record, audit="1"), make_unit()
        with closing(Worker(job)) as worker:
            assert worker.score(0, take(unit, range(8))).failure is None
            real = runner.score_completions

            def wrong(*arguments: Any) -> Iterator[Any]:
                for step in real(*arguments):
                    for _, score in step.scores:
                        score.token_logps[-1] -= 0.5
                    yield step

            monkeypatch.setattr(runner, "score_completions", wrong)
            receipt: Receipt = worker.score(1, take(unit, range(8, len(unit))))
        failure = receipt.failure
        assert failure and failure.withdraws and receipt.num_completions == 0
        assert "gives other log-probs for row" in failure.message and "withdrawn" not in failure.message
        assert failure.advice.startswith("Run again with `attention` rows")
        assert record.fail() == (1, 0)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["format.json"]


def _id_of(model: str) -> str:
    inputs = Inputs(PrecomputeOptions(model=model, dataset="rows", cache="c", dtype="float32", device="cpu"))
    return identify_reference(inputs, read_config(inputs), "tokenizer", print).id


def test_remarks_are_in_the_receipt(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.lm.own_forward.fits_into_memory", lambda *_: False)
    with closing(Worker(describe_job(model, tmp_path / "cache"))) as worker:
        receipt = worker.score(0, make_unit())
        assert any("the audit leaves out a completion of row" in text for text in receipt.remarks)
        assert worker.score(1, make_unit()).remarks != receipt.remarks, "each is in one receipt"
