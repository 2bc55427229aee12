"""A progress line off a terminal: a line every ten seconds, and long phases."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from dpo_cache import progress
from dpo_cache.log import phase
from dpo_cache.progress import ProgressLine, show_scoring, show_training


class Timers:
    """In place of `threading.Timer`: they fire when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[threading.Timer] = []

    def __call__(self, seconds: float, function, arguments) -> SimpleNamespace:
        timer = SimpleNamespace(fire=lambda: function(*arguments), start=lambda: self.waiting.append(timer))
        timer.cancel = lambda: self.waiting.remove(timer) if timer in self.waiting else None
        return timer


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def test_a_line_every_ten_seconds(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("scoring") as line:
        line.update(1, 4, ["5 pairs/s"], position="25%", left="9.0 s left")
        now[0] = 10
        line.update(2, 4, ["5 pairs/s"], position="50%", left="6.0 s left")
        line.update(3, 4)
    assert capsys.readouterr().err == "scoring  50%  5 pairs/s  6.0 s left\n"


def test_a_line_that_has_not_changed_is_not_repeated(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("sweep") as line:
        for seconds, details in (
            (10, ["starting"]),
            (20, ["starting"]),
            (30, ["step 1/9"]),
            (40, ["step 1/9"]),
        ):
            now[0] = seconds
            line.update(0, 4, details, position="run 1/4")
    assert capsys.readouterr().err == "sweep  run 1/4  starting\nsweep  run 1/4  step 1/9\n"


REMARK = "the model of the run is another than the reference, so rewards are against the cached log-probs."


def test_remarks_are_wrapped_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    progress.remark(REMARK)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress.remark(REMARK)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == REMARK and max(map(len, lines)) <= 40 and " ".join(lines) == REMARK


def test_a_long_phase_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timers = Timers()
    monkeypatch.setattr(progress.threading, "Timer", timers)
    with ProgressLine("scoring"):
        with phase("loading the model"):
            (timer,) = timers.waiting
            timer.fire()
        with phase("short"):
            assert len(timers.waiting) == 1
    assert timers.waiting == []
    assert capsys.readouterr().err == "scoring: loading the model …\n"


def test_progress_that_is_off_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_CACHE_PROGRESS", "off")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressLine("scoring") as line, phase("loading"):
        line.update(1, 2, position="50%")
    assert capsys.readouterr().err == ""


class Line:
    """In place of a progress line: keeps what it is given."""

    def update(self, done, total, details=(), *, position="", left="") -> None:
        self.shown = (done / total, position, list(details), left)

    def note_metrics(self, metrics) -> bool:
        return False


def test_the_chunk_search_is_named() -> None:
    line = Line()
    scoring = SimpleNamespace(
        pairs_per_s=2.0, tokens_per_s=1000.0, num_workers=0, trial_tokens=512, num_tokens=1, total_tokens=4, seconds_left=3.0,
    )  # fmt: skip
    show_scoring(line, scoring)  # type: ignore[arg-type]
    assert line.shown == (
        0.25,
        "25%",
        ["trying chunks of 512 tokens", "2.00 pairs/s", "1,000 tokens/s"],
        "3.0 s left",
    )
    scoring.trial_tokens = 0
    show_scoring(line, scoring)  # type: ignore[arg-type]
    assert line.shown[2] == ["2.00 pairs/s", "1,000 tokens/s"]


def test_a_step_is_the_position_and_its_metrics_the_details() -> None:
    line, metrics = (
        Line(),
        {
            "step": 3, "total_steps": 4, "loss": 0.5, "rewards/accuracies": None, "rewards/margins": 0.1, "left_s": None,
            "pairs_per_s": 2.0, "peak_bytes": 10**9,
        },
    )  # fmt: skip
    show_training(line, metrics)  # type: ignore[arg-type]
    assert line.shown == (
        0.75,
        "step 3/4",
        ["loss 0.5000", "accuracy -", "margin +0.1000", "2.00 pairs/s", "1.00 GB"],
        "",
    )
