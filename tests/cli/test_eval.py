"""`eval` as a user sees it."""

import json
import re
from pathlib import Path

import pytest

from dpo_cache import evaluation
from tests.cli.test_commands import precompute, run  # noqa: F401  (a fixture)


@pytest.fixture
def cache(run, model_folder: str, data_file: str, tmp_path: Path) -> Path:
    precompute(run, model_folder, data_file, tmp_path / "cache")
    return tmp_path / "cache"


def test_the_report_is_on_stdout_and_remarks_on_stderr(
    run, cache: Path, model_folder: str, tmp_path: Path
) -> None:
    trained = run(
        "train",
        "--cache",
        cache,
        "--output",
        tmp_path / "run",
        "--batch-size",
        4,
        "--lr",
        1e-3,
        "--warmup-ratio",
        0,
    )
    assert trained.code == 0
    done = run(
        "eval",
        "--cache",
        cache,
        "--model",
        tmp_path / "run" / "model",
        "--output",
        tmp_path / "margins.jsonl",
    )
    assert done.code == 0, done.err
    found, shared, gap = done.err.splitlines()
    assert shared == (
        f"12 of 12 pairs have prompts that {tmp_path}/run was trained on: their accuracy and margins are not "
        "those of new prompts."
    )
    assert found == (
        f"{tmp_path}/run/model is the model of a run, whose loss settings are used: sigmoid, beta 0.1."
    )
    assert gap.startswith("the model is another than the reference (largest gap ") and "weights: " in gap
    first = done.out.splitlines()[0]
    assert first.startswith(f"pairs/train: {tmp_path}/run/model compared with reference ") and first.endswith(
        ", float32, attention: forest"
    )
    assert labels(done.out) == RESULTS
    assert done.out.splitlines()[-1] == f"One line a pair is in {tmp_path}/margins.jsonl."
    assert len((tmp_path / "margins.jsonl").read_text().splitlines()) == 12

    whole = run("eval", "--cache", cache, "--model", tmp_path / "run" / "model", "--verbose")
    found = labels(whole.out)
    assert [label for label in found if label in RESULTS] == RESULTS
    assert {"  by policy logps per token", "Brier score", "moved from the reference", "peak memory"} < {
        *found
    }
    for title in ("reward ", "confidence ", "by which is longer ", "by both answers ", "by prompt "):
        assert any(line.startswith(title) for line in whole.out.splitlines()), title
    assert whole.out.splitlines()[-1] == (
        "Next: the same command with --output PAIRS.jsonl for one line a pair."
    )


RESULTS = [
    "pairs", "loss", "  settings of", "accuracy", "  by reference logps", "margin", "calibration error",
]  # fmt: skip


def labels(out: str) -> list[str]:
    """The labels of the first table."""
    lines = out.splitlines()[1:]
    rows = lines[: next(index for index, line in enumerate(lines) if not line.startswith("  "))]
    return [line[2:].rstrip().split("  ")[0] or "  " + line[4:].split("  ")[0] for line in rows]


def test_there_is_no_accuracy_of_rounding_noise(run, cache: Path, model_folder: str) -> None:
    short = run("eval", "--cache", cache, "--model", model_folder)
    rows = dict(re.findall(r"(?m)^ +(.+?)  +(.+)$", short.out))
    assert (rows["accuracy"], rows["calibration error"]) == ("- (margins are rounding noise)", "-")
    assert "%" in rows["by reference logps"] and rows["margin"].endswith("for 90% of the pairs")
    whole = run("eval", "--cache", cache, "--model", model_folder, "--verbose")
    by_length = whole.out.partition("by which is longer")[2].splitlines()[1:-1]
    assert len(by_length) > 9 and not [line for line in by_length if "%" in line and "by " not in line]
    report = json.loads(run("eval", "--cache", cache, "--model", model_folder, "--json").out)
    assert (report["accuracy"]["share"], report["accuracy"]["low"], report["accuracy"]["ties"]) == (
        None,
        None,
        12,
    )
    assert report["metrics"]["rewards/accuracies"] is None
    assert report["calibration"]["expected_error"] is None


def test_json_is_all_of_stdout(run, cache: Path, model_folder: str) -> None:
    done = run(
        "eval",
        "--cache",
        cache,
        "--model",
        model_folder,
        "--loss",
        "sigmoid:0.5",
        "--loss",
        "sft",
        "--limit",
        7,
        "--json",
    )
    report = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (report["num_pairs"], report["pairs_in_set"], report["accuracy"]["count"]) == (7, 12, 7)
    assert report["gap"]["is_reference"] is True and report["metrics"]["loss/sigmoid"] == pytest.approx(
        0.6931, abs=1e-4
    )
    assert (
        len(report["calibration"]["bins"]) == 10
        and sum(entry["count"] for entry in report["calibration"]["bins"]) == 7
    )


def test_mistakes_give_one_error(run, cache: Path, model_folder: str, tmp_path: Path) -> None:
    def told(*arguments: object) -> tuple[int, str, str]:
        done = run("eval", *arguments)
        return done.code, done.err, done.out

    assert told("--cache", tmp_path / "none", "--model", model_folder) == (
        1,
        f"error: {tmp_path}/none: no dpo-cache here (no such folder).\n"
        f"Check the path, or run `dpo-cache precompute --cache {tmp_path}/none …` to make one.\n",
        "",
    )
    assert told("--cache", cache, "--model", model_folder, "--pairs", "other") == (
        1,
        f"error: {cache}: no pair set 'other'.\nIt holds: pairs/train.\n",
        "",
    )
    code, errors, _ = told("--cache", cache, "--model", tmp_path / "none")
    assert code == 1 and errors.startswith(f"error: {tmp_path}/none: no model can be loaded from it")
    assert (
        told("--cache", cache, "--model", model_folder, "--loss", "hinge", "--label-smoothing", 0.1)[0] == 2
    )
    assert told("--cache", cache, "--model", model_folder, "--output", "pairs.txt")[:2] == (
        2,
        "error: --output pairs.txt: no format has this ending.\nEnd it in .jsonl or .parquet.\n",
    )


def test_ctrl_c_leaves_nothing_behind(
    run, cache: Path, model_folder: str, tmp_path: Path, monkeypatch
) -> None:
    real = evaluation.run.score_pairs

    def interrupt(*arguments: object) -> None:
        def stop(_: object) -> None:
            raise KeyboardInterrupt

        real(*arguments[:-1], stop)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation.run, "score_pairs", interrupt)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("eval", "--cache", cache, "--model", model_folder, "--output", tmp_path / "pairs.parquet")
    assert (done.code, done.out) == (130, "") and "interrupted" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
