"""The day that a chat template writes is that of the pair set's first run."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import dpo_cache
from dpo_cache.errors import OptionError
from dpo_cache.precomputing import planned, template_days
from dpo_cache.precomputing.template_days import RECORD
from tests.conftest import chat_rows
from tests.precomputing.test_run import refuse_models

TEMPLATE = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FIRST, NEXT = date(2026, 11, 28), date(2026, 11, 29)


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def score(model_folder: str, cache: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    def score(day: date, *, num_rows: int = 4, **options: Any) -> dpo_cache.PrecomputeReport:
        """A run on that day."""
        monkeypatch.setattr(template_days, "today", lambda: day)
        options = {"name": "pairs", "chat_template": template, "audit": "off", **options}
        return dpo_cache.precompute(model_folder, Dataset.from_list(chat_rows(num_rows)), cache, **options)

    return score


def prompt(cache: Path, model_folder: str, name: str = "pairs") -> str:
    pair = next(iter(dpo_cache.open_cache(cache).pairs(name))).pair
    return AutoTokenizer.from_pretrained(model_folder).decode(pair.chosen.prompt_ids)


def written_day(cache: Path, name: str = "pairs") -> str | None:
    return dpo_cache.open_cache(cache).pairs(name).manifest["tokenization"].get("template_date")


def test_later_runs_write_the_day_of_the_first(
    score: Any, cache: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(FIRST)
    assert first.scored_now > 0
    assert first.remarks == [
        "the chat template writes the day: 2026-11-28, which later runs of the pair set write, too. Another can "
        "be given as `template_date`."
    ]
    assert written_day(cache) == "2026-11-28"
    assert prompt(cache, model_folder).startswith("Today is 28 November 2026.")
    assert not list(cache.rglob(RECORD))
    refuse_models(monkeypatch)
    assert score(NEXT).scored_now == 0
    assert written_day(cache) == "2026-11-28"


def test_an_interrupted_first_run_resumes_on_another_day_with_its_scores(
    score: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(planned, "publish_pair_set", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score(FIRST)
    refuse_models(monkeypatch)
    assert score(NEXT).scored_now == 0
    assert written_day(cache) == "2026-11-28"
    assert not list(cache.rglob(RECORD))


def test_a_day_can_be_given(score: Any, cache: Path, model_folder: str) -> None:
    score(FIRST, template_date="2024-07-26")
    assert prompt(cache, model_folder).startswith("Today is 26 July 2024.")
    score(FIRST, template_date="2024-07-27")
    assert written_day(cache) == "2024-07-27"
    with pytest.raises(OptionError, match="^`template_date` tomorrow: expected a day, such as 2026-11-28.$"):
        score(FIRST, template_date="tomorrow")


def test_a_new_split_gets_the_day_of_the_others(score: Any, cache: Path, model_folder: str) -> None:
    score(FIRST)
    rows = {"train": Dataset.from_list(chat_rows(4)), "test": Dataset.from_list(chat_rows(2))}
    template_file = str(cache.parent / "template.jinja")
    dpo_cache.precompute(
        model_folder,
        rows,
        cache,
        name="pairs",
        split=("train", "test"),
        chat_template=template_file,
        audit="off",
    )
    assert [written_day(cache, f"pairs/{split}") for split in rows] == ["2026-11-28"] * 2


def test_a_dry_run_records_nothing(score: Any, cache: Path) -> None:
    score(FIRST, dry_run=True)
    assert not cache.exists()


def test_without_a_day_in_the_template_nothing_is_recorded(model_folder: str, cache: Path) -> None:
    report = dpo_cache.precompute(
        model_folder,
        Dataset.from_list(chat_rows(2)),
        cache,
        name="pairs",
        template_date="2024-07-26",
        audit="off",
    )
    assert report.remarks[0] == (
        "`template_date` 2024-07-26 has no effect: the chat template does not write the day."
    )
    assert written_day(cache) is None
