"""Runs TRL's tests with both trainers: `python -m tests.trl_suite.compare FOLDER`.

What TRL's trainer passes, ours must pass, or it is in `DIFFERENT`, with the reason. Exits with 1 otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import trl

from tests.trl_suite.prepare import prepare

TESTS = "tests/test_dpo_trainer.py"
PLUGIN = Path(__file__).parent / "plugin"
# Tests that TRL's trainer passes and ours does not: a pattern of names, and why
DIFFERENT = {
    "*::test_train_with_explicit_ref_model": "a `ref_model` is refused: the cache has the reference's log-probs",
    "*::test_train_with_sync_ref_model": "`sync_ref_model` is refused: a cached reference does not change",
    "*::test_precompute_ref_log_probs_raises_for_iterable_dataset*": "a refusal that is lifted: streams work",
    "*::test_evaluate_with_eval_dataset[[]*iterable*-True[]]": "a refusal that is lifted: streams work",
    "*::test_evaluate_precompute_ref_log_probs_after_training_raises": "a refusal that is lifted: the cache has "
    "the reference's log-probs also after training",
}
Outcomes = dict[str, tuple[str, str]]


def main(source: Path) -> int:
    version = (source / "VERSION").read_text().strip()
    print(f"TRL {trl.__version__}, tests of the source of {version} in {source}")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        theirs, ours = (run(source, Path(folder), trainer) for trainer in ("trl", "ours"))
    for name, outcomes in (("TRL's trainer", theirs), ("CachedDPOTrainer", ours)):
        print(f"{name}: {', '.join(f'{count} {kind}' for kind, count in counts(outcomes).items())}")
    different, unexpected, stale = compare(theirs, ours)
    for (tests, error), count in failures(theirs).items():
        print(f"fails with TRL's trainer, {count} of {tests}: {error}")
    for test, reason in different:
        print(f"different  {test}: {reason}")
    for pattern in stale:
        print(f"no longer different: {pattern}")
    for test in unexpected:
        print(f"UNEXPECTED {test}: {ours.get(test, ('not run', ''))}")
    return 1 if unexpected or stale else 0


def compare(theirs: Outcomes, ours: Outcomes) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Tests that ours does not pass though theirs does, with reasons; those without one; patterns without a
    test.
    """
    failed = [
        test
        for test, (outcome, _) in theirs.items()
        if outcome == "passed" and ours.get(test, ("", ""))[0] != "passed"
    ]
    different = [
        (test, reason)
        for test in failed
        for pattern, reason in DIFFERENT.items()
        if fnmatchcase(test, pattern)
    ]
    known = {test for test, _ in different}
    stale = [pattern for pattern in DIFFERENT if not any(fnmatchcase(test, pattern) for test in known)]
    return different, [test for test in failed if test not in known], stale


def counts(outcomes: Outcomes) -> Counter[str]:
    return Counter(outcome for outcome, _ in outcomes.values())


def failures(outcomes: Outcomes) -> Counter[tuple[str, str]]:
    """How often each error ended a test, by the test's name without its parameters and the error's last line."""
    return Counter(
        (test.partition("[")[0], line) for test, (outcome, line) in outcomes.items() if outcome == "failed"
    )


def run(source: Path, folder: Path, trainer: str) -> Outcomes:
    """The outcome of each test with a trainer, in a process of its own."""
    outcomes = folder / f"{trainer}.json"
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_CACHE": str(folder / f"read-{trainer}"),
        "PYTHONPATH": str(PLUGIN), "DPO_CACHE_TRL_FOLDER": str(folder), "DPO_CACHE_TRL_TRAINER": trainer,
        "DPO_CACHE_TRL_OUTCOMES": str(outcomes),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-W", "ignore", "-p",
               PLUGIN_NAME, str(source / TESTS)]  # fmt: skip
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    return {test: (outcome, line) for test, (outcome, line) in json.loads(outcomes.read_text()).items()}


PLUGIN_NAME = "dpo_cache_in_trl_tests"

if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / TESTS).is_file():
        sys.exit(f"Give the folder of a checkout of TRL, with {TESTS}: make test-trl TRL_SOURCE=FOLDER")
    sys.exit(main(Path(sys.argv[1]).resolve()))
