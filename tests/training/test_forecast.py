"""A dry run of training ends with time, memory and disk of the whole run."""

import json
from pathlib import Path

import pytest

from dpo_cache.store import open_cache
from dpo_cache.training.evaluations import schedule_of
from dpo_cache.training.forecast import count_evaluations
from tests.conftest import make_llama
from tests.training.test_loop import train


def test_evaluations_are_counted_as_they_happen(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", eval_pairs="heldout", eval_every=3, epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = max(line["step"] for line in lines)
    evaluated = sum("eval/loss" in line for line in lines)
    assert count_evaluations(schedule_of("`eval_every`", "3", 4), steps) == evaluated


def test_the_time_is_that_of_mean_pairs(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", dry_run=True, epochs=3)
    pairs = list(open_cache(cache).pairs("pairs"))
    tokens = sorted((len(one.pair.chosen) + one.pair.rejected.num_tokens for one in pairs), reverse=True)
    found = report.forecast
    assert found is not None and report.last is not None
    step_s = report.last["num_pairs"] / report.last["pairs_per_s"]
    longest = sum(
        len(one.pair.chosen) + one.pair.rejected.num_tokens
        for one in sorted(pairs, key=lambda one: -len(one.pair.chosen) - len(one.pair.rejected))[:4]
    )
    assert found.seconds == pytest.approx(step_s / longest * 3 * sum(tokens))
    assert found.device_bytes == report.peak_bytes
    assert found.disk_bytes == sum(one.nbytes for one in make_llama().parameters())
    assert not (tmp_path / "run").exists()


def test_evaluations_take_a_share_of_a_step(cache: str, tmp_path: Path) -> None:
    report = train(
        cache, tmp_path / "run", dry_run=True, eval_pairs="heldout", eval_every=1, save_every=2, keep=2
    )
    found, last = report.forecast, report.last
    assert found is not None and last is not None
    plain = train(cache, tmp_path / "run", dry_run=True).forecast
    assert plain is not None
    weights = sum(one.nbytes for one in make_llama().parameters())
    assert found.disk_bytes == weights * (3 * 3 + 2 + 1) > plain.disk_bytes == weights
