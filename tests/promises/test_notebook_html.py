"""Every report has HTML for notebooks, in which all that may come from files is escaped."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

import dpo_cache
from dpo_cache.precomputing.rescore import RescoreReport
from dpo_cache.store.upkeep.repair import RepairReport
from tests.notebook.test_html import HOSTILE, Texts

REPORTS = [name for name in dpo_cache.__all__ if name.endswith("Report")]
METRICS = {
    f"{prefix}{name}": 0.5
    for prefix in ("", "eval/")
    for name in ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
}


# Values of fields whose type does not say what is in them, from the text of all names.
MEMBERS: dict[tuple[str, str], Callable[[str], Any]] = {
    **{("TrainReport", name): lambda _: METRICS for name in ("first", "last", "eval_before", "eval_after")},
    ("TrainReport", "best"): lambda text: {"measure": text, "value": 0.5, "step": 2},
    ("EvalReport", "metrics"): lambda _: METRICS,
    ("EvalReport", "logratio_per_token"): lambda _: {"chosen": 0.5, "rejected": -0.5},
    ("VerifyReport", "repair"): lambda text: made(RepairReport, text),
    ("VerifyReport", "rescored"): lambda text: [made(RescoreReport, text)],
}


def made(kind: Any, text: str) -> Any:
    """A value of this type in which every text is `text`, and no list and no option is empty."""
    if is_dataclass(kind):
        hints, values = get_type_hints(kind), {}
        for entry in filter(lambda entry: entry.init, fields(kind)):
            known = MEMBERS.get((kind.__name__, entry.name))
            values[entry.name] = known(text) if known else made(hints[entry.name], text)
        return kind(**values)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return made(inner[0], text)
    if origin in (list, tuple):
        return origin([made(inner[0], text)])
    if origin is dict:
        return {made(inner[0], text): made(inner[1], text)}
    return {str: text, int: 3, float: 0.5, bool: True}.get(kind, text)


@pytest.mark.parametrize("name", REPORTS)
def test_reports_escape_what_they_show(name: str) -> None:
    kind = getattr(dpo_cache, name)
    page = made(kind, HOSTILE)._repr_html_()
    assert "\x1b" not in page and "&lt;script&gt;alert(1)" in page
    assert Texts(page).tags == Texts(made(kind, "a text")._repr_html_()).tags


@pytest.mark.parametrize("name", REPORTS)
def test_reports_have_html_where_nothing_was_found(name: str) -> None:
    kind = getattr(dpo_cache, name)
    empty = made(kind, "a text")
    for entry in fields(kind):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if default is not MISSING:
            object.__setattr__(empty, entry.name, default)
    assert re.search(r'<div class="dpo-cache">.+</div>$', empty._repr_html_(), re.DOTALL)


@pytest.mark.parametrize("name", ["first", "last", "eval_before", "eval_after"])
def test_a_run_without_a_measurement_leaves_its_line_out(name: str) -> None:
    report = made(dpo_cache.TrainReport, "a text")
    before = report._repr_html_().count("<tr>")
    setattr(report, name, None)
    assert report._repr_html_().count("<tr>") == before - 1


def test_an_accuracy_that_is_not_known_is_a_dash() -> None:
    report = made(dpo_cache.TrainReport, "a text")
    report.last = {**METRICS, "rewards/accuracies": None}
    assert '<td class="number">-</td>' in report._repr_html_()


def test_the_best_evaluation_is_shown_if_it_is_not_the_last() -> None:
    report = made(dpo_cache.TrainReport, "loss")
    assert report.num_steps == 3 and "loss 0.5000 at step 2" in report._repr_html_()
    report.best["step"] = 3
    assert "best evaluation" not in report._repr_html_()
