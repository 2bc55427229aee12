"""The lines of a run: torn, damaged, dropped and kept."""

import errno
import json
import os
from pathlib import Path

import pytest

from dpo_cache.errors import TrainingError
from dpo_cache.training.output import metrics_file
from dpo_cache.training.output.metrics_file import MetricsFile


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    found = MetricsFile(tmp_path / "metrics.jsonl")
    for number in range(1, 7):
        found.append({"step": number, "loss": number / 2})
    return found


def steps(file: MetricsFile) -> list[int]:
    return [line["step"] for line in file.lines()]


def damage(file: MetricsFile, number: int, line: bytes) -> None:
    lines = file.path.read_bytes().split(b"\n")
    lines[number - 1] = line
    file.path.write_bytes(b"\n".join(lines))


DAMAGED = {
    "zeros": bytes(20),
    "no text": b"\xff\xfe{}",
    "torn": b'{"step": 3, "lo',
    "no object": b"[1, 2]",
    "no step": b'{"loss": 1}',
    "step of text": b'{"step": "three"}',
    "no number": b'{"step": 3, "loss": NaN}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_only_itself_and_is_named(file: MetricsFile, line: bytes) -> None:
    damage(file, 3, line)
    assert steps(file) == [1, 2, 4, 5, 6] and file.last("loss") == {"step": 6, "loss": 3.0}
    remarks: list[str] = []
    file.keep_until(5, remarks.append)
    assert remarks == [f"{file.path}: line 3 not readable, dropped; the other 4 lines up to step 5 are kept."]
    assert steps(file) == [1, 2, 4, 5] and file.path.read_bytes().count(b"\n") == 4
    remarks.clear()
    file.keep_until(5, remarks.append)
    assert not remarks


def test_lines_after_the_checkpoint_are_dropped_without_a_remark(file: MetricsFile) -> None:
    """Of these, the last one is torn where a run was killed."""
    damage(file, 5, b"damaged")
    with open(file.path, "a") as out:
        out.write('{"step": 7, "lo')
    remarks: list[str] = []
    file.keep_until(3, remarks.append)
    assert steps(file) == [1, 2, 3] and not remarks


def test_a_torn_last_line_is_dropped_without_a_remark(file: MetricsFile) -> None:
    with open(file.path, "a") as out:
        out.write('{"step": 7, "lo')
    remarks: list[str] = []
    file.keep_until(6, remarks.append)
    assert steps(file) == [1, 2, 3, 4, 5, 6] and not remarks


def test_an_empty_file_and_none_are_kept_as_they_are(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.keep_until(3, print)
    file.fsync()
    assert not file.path.exists() and file.lines() == []
    file.path.write_bytes(b"")
    file.keep_until(3, print)
    assert file.path.read_bytes() == b""


def test_a_disk_that_refuses_to_sync_is_one_clear_error(
    file: MetricsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(metrics_file, "sync", fail)
    with pytest.raises(
        TrainingError, match=r"cannot write .*metrics.jsonl(?s:.*)the quota is used up(?s:.*)`resume`"
    ):
        file.fsync()


STEP = {"loss": 0.5, "num_pairs": 4, **{f"rewards/{name}": 0.1 for name in ("chosen", "rejected", "accuracies", "margins")}}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 3, "loss": 0.5}',
        b'{"step": 3, "loss": "low"}',
        b'{"step": 3, "note": 1}',
        json.dumps({"step": 3, **STEP, "rewards/margins": None}).encode(),
        json.dumps({"step": 3, **STEP, "rewards/accuracies": "-"}).encode(),
    ],
)
def test_a_line_without_the_metrics_of_its_step_is_damaged(tmp_path: Path, line: bytes) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", has_steps=True)
    for number in range(1, 6):  # an accuracy may be unknown
        file.append({"step": number, **STEP, "rewards/accuracies": None if number == 1 else 0.5})
    file.append({"step": 5, **{f"eval/{name}": value for name, value in STEP.items()}})
    damage(file, 3, line)
    remarks: list[str] = []
    file.keep_until(5, remarks.append)
    assert steps(file) == [1, 2, 4, 5, 5]
    assert "line 3 not readable" in remarks[1] and "no line of step 3, 1 of 5 in all" in remarks[0]


def test_steps_whose_lines_are_gone_are_named(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", has_steps=True)
    for number in (1, 2, 5, 6):
        file.append({"step": number, **STEP})
    remarks: list[str] = []
    file.keep_until(5, remarks.append)
    assert steps(file) == [1, 2, 5]
    assert remarks == [
        f"{file.path}: no line of step 3, 4, 2 of 5 in all; the run continues, and tables and plots lack them."
    ]
