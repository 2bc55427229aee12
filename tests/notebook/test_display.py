"""Live progress in a notebook, without a notebook; `tests/example_notebooks` has real ones."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_cache.notebook.display import LAST_REMARKS, SECONDS, NotebookProgress, notebook_output
from dpo_cache.progress import ProgressLine, show_sweep, show_training
from tests.notebook.test_html import HOSTILE, Texts
from tests.notebook.test_live_table import evaluation, step


class Notebook:
    """Collects what is shown, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.outputs: list[dict[str, str]] = []
        self.progress = NotebookProgress("training", self.outputs.append, lambda: self.now)

    @property
    def texts(self) -> list[str]:
        return Texts(self.outputs[-1]["text/html"]).texts


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


def test_nothing_is_shown_before_there_is_progress(notebook: Notebook) -> None:
    notebook.progress.close()
    assert notebook.outputs == []


def test_states_that_follow_fast_are_skipped_and_the_last_is_shown(notebook: Notebook) -> None:
    notebook.progress.update(0.1, "first")
    notebook.progress.update(0.2, "skipped")
    assert len(notebook.outputs) == 1
    notebook.now += SECONDS
    notebook.progress.update(0.3, "third")
    notebook.progress.update(0.4, "last")
    assert len(notebook.outputs) == 2
    notebook.progress.close()
    assert [output["text/plain"].splitlines()[0] for output in notebook.outputs] == [
        "training  first",
        "training  third",
        "training  last",  # ended early
    ]


def test_a_bar_that_is_full_shows_the_time_at_the_end(notebook: Notebook) -> None:
    notebook.progress.update(1.0, "0.0 s left")
    notebook.now += 2.5
    notebook.progress.close()
    assert notebook.outputs[-1]["text/plain"] == "training  done in 2.5 s"


def test_work_of_which_nothing_was_left_is_done(notebook: Notebook) -> None:
    notebook.progress.update(0.0, "reading rows")
    notebook.now += 1.0
    notebook.progress.close()
    assert notebook.outputs[-1]["text/plain"] == "training  done in 1.0 s"
    assert "width:100.0%" in notebook.outputs[-1]["text/html"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_work_that_fails_is_not_done(notebook: Notebook, share: float) -> None:
    notebook.progress.update(share, "reading rows")
    notebook.progress.close(has_failed=True)
    assert notebook.outputs[-1]["text/plain"] == "training  reading rows"
    assert f"width:{share:.1%}" in notebook.outputs[-1]["text/html"]


def test_names_from_files_are_escaped(notebook: Notebook) -> None:
    notebook.progress.remark(HOSTILE)
    notebook.now += SECONDS
    notebook.progress.update(0.5, HOSTILE)
    notebook.progress.close()
    tags = {tag for tag, _ in Texts(notebook.outputs[-1]["text/html"]).tags}
    assert tags == {"style", "div", "b", "span"}
    assert "\x1b" not in "".join(notebook.outputs[-1].values())


def test_only_the_last_remarks_are_shown(notebook: Notebook) -> None:
    for number in range(LAST_REMARKS + 5):
        notebook.progress.remark(f"remark {number}")
    notebook.progress.close()
    assert notebook.texts[-LAST_REMARKS - 1 :: LAST_REMARKS] == ["(5 remarks before these)", "remark 24"]


# -- what a `ProgressLine` does in a notebook ------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """A stand-in for IPython with a kernel; returns its outputs."""
    shown: list[tuple[str, dict[str, str]]] = []

    class DisplayHandle:
        def display(self, bundle: dict[str, str], raw: bool) -> None:
            shown.append(("display", bundle))

        def update(self, bundle: dict[str, str], raw: bool) -> None:
            shown.append(("update", bundle))

    display = SimpleNamespace(DisplayHandle=DisplayHandle)
    shell = SimpleNamespace(kernel=object())
    fake = SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    return shown


def train(line: ProgressLine, *metrics: dict[str, Any]) -> None:
    for entry in metrics:
        show_training(line, {"left_s": 3.0, "pairs_per_s": 2.0, "peak_bytes": 10**9, **entry})


def test_training_shows_a_bar_and_a_table_in_one_output(kernel: list, capsys: pytest.CaptureFixture) -> None:
    with ProgressLine("training") as line:
        train(line, evaluation(0), *map(step, range(1, 18)), evaluation(17))
        line.remark("a remark")
    assert [kind for kind, _ in kernel[:2]] == ["display", "update"]
    page = Texts(kernel[-1][1]["text/html"])
    assert page.texts[1] == "training" and page.texts[2].startswith("done in ") and "a remark" in page.texts
    assert page.texts.count("0.6000") == 2 and "15 to 16" in page.texts
    assert capsys.readouterr().err == ""  # which notebooks show on red


def test_a_terminal_shows_no_table(capsys: pytest.CaptureFixture) -> None:
    with ProgressLine("training") as line:
        train(line, evaluation(0))
    assert capsys.readouterr().err.startswith("eval at step 0: loss 0.6000")


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notebook_output() is None
    terminal = SimpleNamespace(get_ipython=lambda: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert notebook_output() is None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert notebook_output() is None


def test_progress_that_is_off_is_off_in_notebooks(kernel: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE_PROGRESS", "off")
    with ProgressLine("training") as line:
        train(line, step(1))
    assert kernel == []


def test_an_error_leaves_the_state_in_which_it_came(kernel: list) -> None:
    with pytest.raises(KeyboardInterrupt), ProgressLine("training") as line:
        train(line, *map(step, range(1, 4)))
        raise KeyboardInterrupt
    assert kernel[-1][1]["text/plain"].startswith("training  step 3/17")


def test_a_sweep_shows_its_runs(kernel: list) -> None:
    active = [("beta=0.1", 17, {**step(3), "pairs_per_s": 2.0})]
    progress = SimpleNamespace(num_done=0, num_runs=2, active=active, done=0.1, seconds_left=None)
    with ProgressLine("sweep") as line:
        show_sweep(line, progress)
    page = Texts(kernel[-1][1]["text/html"])
    assert {"sweep", "beta=0.1", "3/17", "75.0%"} <= set(page.texts)
