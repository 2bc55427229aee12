"""Precompute on Ray: what it costs compared with one process, and how it scales.

    python benchmarks/ray_workers.py overhead --model MODEL --data FILE [--rows N] [--turns 3]
    python benchmarks/ray_workers.py scale [--workers 8,64] [--unit-s 20] [--units 16]

`overhead` scores the same rows in one process of two threads and by two actors of one thread, in turn, into a
fresh cache each time. `scale` has the real driver, Ray and cache, and workers that sleep instead of scoring;
before, it measures the costs of a unit that takes no time, and simulates more workers with them.
Every figure is printed with what it is: real, slept or simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from ray_simulation import Costs, simulate

THREADS = 2
COMPLETIONS, TOKENS = 40, 250  # of a unit whose scoring is slept: 10,000 tokens
WARM_UP, MEASURED = 20, 300  # units that take no time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    overhead = commands.add_parser("overhead")
    overhead.add_argument("--model", required=True)
    overhead.add_argument("--data", required=True)
    overhead.add_argument("--rows", type=int)
    overhead.add_argument("--turns", type=int, default=3)
    one = commands.add_parser("one")  # a run in a process of its own
    one.add_argument("options")
    scale = commands.add_parser("scale")
    scale.add_argument("--workers", default="8,64")
    scale.add_argument("--unit-s", type=float, default=20.0)
    scale.add_argument("--units", type=int, default=16, help="of each worker")
    arguments = parser.parse_args()
    if arguments.command == "one":
        print(json.dumps(run_one(json.loads(arguments.options))))
    elif arguments.command == "overhead":
        measure_overhead(arguments)
    else:
        measure_scale(arguments)


# -- one process against two actors --------------------------------------------------------------------------


def measure_overhead(arguments: argparse.Namespace) -> None:
    sides: dict[str, dict[str, Any]] = {
        "one process": {},
        "two actors": {"ray": "local", "num_workers": 2, "cpus_per_worker": 1},
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(arguments.turns):
        for name, options in sides.items():
            found[name].append(run_side(arguments, name, options))
            shown = "  ".join(f"{key} {value:,.1f}" for key, value in found[name][-1].items())
            print(f"turn {turn}, {name} (real): {shown}", flush=True)
    medians = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for name, turns in found.items()
    }
    plain, actors = medians["one process"], medians["two actors"]
    extra = actors["elapsed_s"] - actors["ray_start_s"] - plain["elapsed_s"]
    print(
        f"two actors take {actors['scoring_s'] / plain['scoring_s'] - 1:+.1%} of one process's scoring time"
    )
    print(f"the whole run takes {extra / plain['elapsed_s']:+.1%}, without Ray's start")
    print(f"Ray's start takes {actors['ray_start_s']:.1f} s")
    print(f"tokens that are run: {actors['model_tokens'] / plain['model_tokens'] - 1:+.2%}")


def run_side(arguments: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, float]:
    """The times of one run, in a fresh process with a fresh cache."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": arguments.model,
            "dataset": arguments.data,
            "cache": folder,
            "limit": arguments.rows,
            **options,
        }
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment["OMP_NUM_THREADS"] = str(THREADS if name == "one process" else 1)
        command = [sys.executable, __file__, "one", json.dumps(given)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])


def run_one(options: dict[str, Any]) -> dict[str, float]:
    """A run of `precompute`; Ray's start is timed apart."""
    import dpo_cache
    from dpo_cache.precomputing.workers.ray_cluster import connected

    ray_start_s = 0.0
    if options.get("ray"):
        started = time.perf_counter()
        with connected(options["ray"]):
            ray_start_s = time.perf_counter() - started
            report = dpo_cache.precompute(**options)
    else:
        report = dpo_cache.precompute(**options)
    return {
        "elapsed_s": report.elapsed_s + ray_start_s,
        "ray_start_s": ray_start_s,
        "scoring_s": report.scoring_s,
        "model_tokens": report.model_tokens,
        "pairs_per_s": report.pairs_per_s,
    }


# -- slept scoring -------------------------------------------------------------------------------------------


class SleepingWorker:
    """A worker that sleeps instead of scoring, and publishes random scores in the real cache."""

    def __init__(self, job: Any):
        from dpo_cache.store.cache import open_cache
        from dpo_cache.store.upkeep.run_record import RunRecord

        self.name, self._job = str(os.getpid()), job
        self._cache = open_cache(job.options.cache, create=True)
        self._record = RunRecord(self._cache, job.reference_id, run=job.run)

    def score(self, number: int, unit: Any) -> Any:
        from dpo_cache.precomputing.workers.job import Receipt
        from dpo_cache.store.format.keys import key_array
        from dpo_cache.store.score_writer import publish_scores
        from dpo_cache.types import Score

        began = time.time()
        time.sleep(unit.planned_tokens / 1000)  # here, these are milliseconds
        slept = time.time()
        generator = np.random.default_rng(number)
        scored = [
            (key, Score(-generator.random(one.num_tokens, np.float32)))
            for key, one in zip(unit.keys, unit.completions, strict=True)
        ]
        self._cache.publish_reference(self._job.identity, self._job.provenance)
        place = f"references/{self._job.reference_id}/scores"
        name, num_bytes = publish_scores(self._cache.folder, place, scored, self._record.add_shard)
        times = json.dumps([began, slept, time.time()])
        return Receipt(
            number, self.name, {name: key_array(unit.keys)}, bytes_written=num_bytes, remarks=(times,)
        )


def sleeping_units(unit_s: float, count: int) -> Iterator[tuple[int, Any]]:
    """Units of random tokens whose sizes differ by up to a quarter, as those of a run do."""
    from dpo_cache.precomputing.units import Unit
    from dpo_cache.store import completion_key
    from dpo_cache.types import Completion

    generator = np.random.default_rng(0)
    for number in range(count):
        ids = generator.integers(0, 50_000, (COMPLETIONS, 2, TOKENS // 2)).astype(np.uint32)
        completions = [Completion(prompt, answer) for prompt, answer in ids]
        keys = [completion_key(one) for one in completions]
        milliseconds = round(1000 * unit_s * generator.uniform(0.75, 1.25))
        yield number, Unit(keys, completions, [[number]] * len(keys), milliseconds)


def run_sleeping(num_workers: int, unit_s: float, count: int) -> tuple[float, list[list[float]]]:
    """A run whose scoring is slept: its seconds without the workers' start, and each unit's worker, begin, end of
    its sleep and end.
    """
    from dpo_cache.options.precompute import PrecomputeOptions
    from dpo_cache.precomputing.workers.job import Job
    from dpo_cache.precomputing.workers.ray import score_units
    from dpo_cache.store import open_cache
    from dpo_cache.store.format.documents import digest_json
    from dpo_cache.store.upkeep.run_record import RunRecord

    identity = {"dtype": "float32", "model": "slept"}
    with tempfile.TemporaryDirectory() as folder:
        cache, reference_id = open_cache(folder, create=True), digest_json(identity)
        options = PrecomputeOptions(
            model="slept",
            dataset="none",
            cache=folder,
            device="cpu",
            ray="local",
            num_workers=num_workers,
            cpus_per_worker=min(1.0, (os.cpu_count() or 1) / num_workers),
        )
        with RunRecord(cache, reference_id) as record:
            job = Job(options, reference_id, identity, {"model": None}, 1, 1, [], record.for_workers())
            index, found = cache.scores(reference_id), []
            made = partial(sleeping_units, unit_s, count)
            for receipt in score_units(job, lambda _: made(), make_worker=SleepingWorker):
                for name, keys in receipt.shards.items():
                    index.add_published(name, keys)
                found.append([float(receipt.worker), *json.loads(receipt.remarks[0])])
            ended = time.time()
    assert len(index) == count * COMPLETIONS, "every completion has a score"
    first = {worker: began for worker, began, *_ in reversed(found)}
    return ended - max(first.values()), found


def measure_scale(arguments: argparse.Namespace) -> None:
    from dpo_cache.precomputing.workers.ray_cluster import connected

    started = time.perf_counter()
    with connected("local"):
        print(f"Ray's start (real): {time.perf_counter() - started:.1f} s", flush=True)
        costs = measure_costs()
        for num_workers in map(int, filter(None, arguments.workers.split(","))):
            show_sleeping(num_workers, arguments)
    for num_workers in (8, 64, 256, 1024):
        count = arguments.units * num_workers
        seconds = np.random.default_rng(0).uniform(0.75, 1.25, count) * arguments.unit_s
        found = simulate(sorted(seconds.tolist(), reverse=True), num_workers, costs)  # as they are handed out
        print(
            f"{num_workers} workers (simulated): efficiency {found.efficiency:.3f}, driver busy "
            f"{found.driver_share:.1%}, ledger busy {found.ledger_share:.1%}"
        )
    limits = {"driver": costs.hand_out + costs.receipt, "ledger": costs.ledger}
    for name, unit_s in sorted(limits.items(), key=lambda entry: -entry[1]):
        print(f"the {name} is busy all the time with {arguments.unit_s / unit_s:,.0f} workers (simulated)")


def measure_costs() -> Costs:
    """The costs of a unit: on this machine, which also runs the workers."""
    import ray

    from dpo_cache.precomputing.workers.ray import _open_ledger

    _, idle = run_sleeping(1, 0.0, WARM_UP + MEASURED)
    idle.sort(key=lambda unit: unit[3])
    per_unit = (idle[-1][3] - idle[WARM_UP][3]) / MEASURED
    publish = statistics.median(unit[3] - unit[2] for unit in idle)
    ledger, started = _open_ledger(ray), 0.0
    for number in range(MEASURED):
        if number == 1:  # the first call waits for its process
            started = time.perf_counter()
        ray.get(ledger.begin.remote(number, [None]))
    begin = (time.perf_counter() - started) / (MEASURED - 1)
    print(
        f"one worker with units of 0 s (real): {1 / per_unit:.0f} units/s, of which a shard takes {publish:.4f} "
        f"s and the ledger {begin:.4f} s",
        flush=True,
    )
    driver = max(0.0, per_unit - publish - begin)
    return Costs(driver / 2, driver / 2, begin, publish)


def show_sleeping(num_workers: int, arguments: argparse.Namespace) -> None:
    """Print the efficiency of a run from the moment when all its workers were at work."""
    elapsed_s, units = run_sleeping(num_workers, arguments.unit_s, arguments.units * num_workers)
    ended = max(unit[3] for unit in units)
    started = ended - elapsed_s
    busy_s = sum(max(0.0, slept - max(began, started)) for _, began, slept, _ in units)
    gaps = []
    for worker in {unit[0] for unit in units}:
        mine = sorted(unit for unit in units if unit[0] == worker)
        gaps += [after[1] - before[3] for before, after in pairwise(mine)]
    print(
        f"{num_workers} workers (real driver and cache, slept scoring): efficiency "
        f"{busy_s / num_workers / elapsed_s:.3f} once all had started; from a unit's end to the next one's begin "
        f"{statistics.median(gaps):.3f} s, at most {max(gaps):.3f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
