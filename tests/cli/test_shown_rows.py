"""`precompute --show`: rows as they are scored."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import dpo_cache
from dpo_cache.cli.shown_rows import print_rows
from dpo_cache.data.shown_rows import ShownRow, ShownSide
from tests.cli.test_commands import Done, run  # noqa: F401  (a fixture)
from tests.cli.test_foreign_text import ESCAPES, shows_no_escapes
from tests.conftest import chat_rows, write_rows
from tests.data.conftest import make_byte_tokenizer


def side(*texts: str) -> ShownSide:
    before, prompt, answer, after = texts
    return ShownSide(before, prompt, answer, after, (len(before), len(prompt), len(answer), len(after)))


PLAIN = ShownRow(
    7,
    side("", "<u>Well?\n<a>", "Yes.\nSure.<end>", ""),
    side("", "<u>Well?\n<a>", "No.<end>", ""),
    special_tokens=("<u>", "<a>", "<end>"),
)
CUT = ShownRow(8, side("<u>We", "ll?", "Yes", ".<end>\n"), side("", "<u>Well?", "No.", ""), was_cut=True)
DROPPED = ShownRow(
    9,
    side("", "a", "b", ""),
    side("", "a", "b", ""),
    "chosen equals rejected",
    notes=("its images are left out",),
)
EMPTY = ShownRow(10, side("", "", "", ""), side("", "", "", ""), "answers all ranked alike")
EARLY = ShownRow(11, side("", "a", " b", ""), side("", "a", " c", ""), moved_boundary=True)

SHOWN = """\
demo/train, row 7:
  prompt, 12 tokens
    <u>Well?\\n
    <a>‖
  chosen, 15 tokens
    ‖Yes.\\n
    Sure.<end>
  rejected, 8 tokens
    ‖No.<end>
demo/train, row 8:
  prompt of chosen, 3 tokens, 5 tokens cut off
    [cut: <u>We]ll?‖
  chosen, 3 tokens, 7 tokens cut off
    ‖Yes[cut: .<end>\\n]
  prompt of rejected, 8 tokens
    <u>Well?‖
  rejected, 3 tokens
    ‖No.
demo/train, row 9: dropped, chosen equals rejected
  note: its images are left out
  prompt, 1 token
    a‖
  chosen, 1 token
    ‖b
  rejected, 1 token
    ‖b
demo/train, row 10: dropped, answers all ranked alike
demo/train, row 11:
  note: the answer starts early: tokens merge across the end of the prompt
  prompt, 1 token
    a‖
  chosen, 2 tokens
    ‖ b
  rejected, 2 tokens
    ‖ c
"""


def test_rows_in_a_file_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("demo/train", [PLAIN, CUT, DROPPED, EMPTY, EARLY])
    assert capsys.readouterr().out == SHOWN


def test_rows_on_a_terminal_have_colors_and_the_same_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_rows("demo/train", [PLAIN])
    out = capsys.readouterr().out
    assert "\x1b[36m<u>\x1b[0m" in out and "\x1b[1;31m‖\x1b[0m" in out
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    print_rows("demo/train", [PLAIN])
    assert capsys.readouterr().out == "".join(SHOWN.splitlines(keepends=True)[:9])


@pytest.mark.parametrize("is_terminal", [False, True])
def test_text_that_would_steer_the_terminal_is_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    foreign = f"[bold]{ESCAPES}\n[/]"
    one = side(foreign, foreign, foreign, foreign)
    row = ShownRow(0, one, one, foreign, notes=(foreign,), special_tokens=(ESCAPES,))
    print_rows(foreign, [row])
    out = capsys.readouterr().out
    assert shows_no_escapes(out) and out.count("\\x1b") > 8 and "[bold]" in out


def test_of_a_long_text_the_start_and_the_end_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a" * 1500 + "b" * 1500
    print_rows("demo/train", [ShownRow(0, side("", long, "c", ""), side("", long, "d", ""))])
    assert f"    {'a' * 1000}[… 1,000 letters …]{'b' * 1000}‖\n" in capsys.readouterr().out


def precompute(run: Any, model: str, rows: list[Any], folder: Path, *more: object) -> Done:
    data = write_rows(folder / "pairs.jsonl", rows)
    return run("precompute", "--model", model, "--dataset", data, "--cache", folder / "cache", *more)


@pytest.mark.parametrize(
    "more", [["--dry-run"], ["--dry-run", "--streaming", "--window", 5], ["--streaming"], []]
)
def test_show_prints_rows_before_the_survey(
    run: Any, model_folder: str, tmp_path: Path, more: list[object]
) -> None:
    done = precompute(run, model_folder, chat_rows(), tmp_path, "--show", 3, *more)
    assert done.code == 0
    blocks = done.out.partition("pairs/train: conversation format")[0].split("pairs/train, row ")[1:]
    assert [block.partition(":")[0] for block in blocks] == ["0", "6", "11"]
    (question,) = chat_rows()[6]["prompt"]
    (answer,) = chat_rows()[6]["chosen"]
    assert f"    <|user|>{question['content']}<|end|><|assistant|>‖\n" in blocks[1]
    assert f"    ‖{answer['content']}<|end|>\n" in blocks[1]


def test_the_rows_are_in_json_and_in_the_report(run: Any, model_folder: str, tmp_path: Path) -> None:
    done = precompute(run, model_folder, chat_rows(), tmp_path, "--show", 2, "--dry-run", "--json")
    (survey,) = json.loads(done.out)["surveys"]
    assert [row["row"] for row in survey["shown"]] == [0, 11]
    assert survey["shown"][0]["chosen"]["answer"] == chat_rows()[0]["chosen"][0]["content"] + "<|end|>"
    events: list[str] = []
    report = dpo_cache.precompute(
        model_folder,
        write_rows(tmp_path / "other.jsonl", chat_rows()),
        tmp_path / "cache",
        show=1,
        streaming=True,
        window=4,
        on_show=lambda survey: events.append(f"{len(survey.shown)} of {survey.rows_read}"),
        on_progress=lambda _: events.append("scored"),
    )
    assert events[0] == "1 of 4" and "1 of 4" not in events[1:] and "scored" in events
    assert len(report.surveys[0]["shown"]) == 1


def test_rows_are_shown_where_none_makes_a_pair(run: Any, model_folder: str, tmp_path: Path) -> None:
    rows = [{**row, "rejected": row["chosen"]} for row in chat_rows()]
    done = precompute(run, model_folder, rows, tmp_path, "--show", 1, "--dry-run")
    assert done.code == 1 and "no row of pairs/train makes a pair" in done.err
    assert done.out.startswith("pairs/train, row 0: dropped, chosen equals rejected\n")


def test_no_rows_are_shown_by_default(run: Any, model_folder: str, tmp_path: Path) -> None:
    done = precompute(run, model_folder, chat_rows(), tmp_path, "--dry-run", "--json")
    assert json.loads(done.out)["surveys"][0]["shown"] == []


def merging(tmp_path: Path) -> str:
    """A tokenizer in which a space merges with the letter y after it."""
    folder = tmp_path / "tokenizer"
    make_byte_tokenizer([("Ġ", "y")]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("more", [[], ["--streaming", "--window", 4]])
def test_most_answers_that_start_early_stop_with_the_rows_shown(
    run: Any, model_folder: str, tmp_path: Path, more: list[object]
) -> None:
    rows = [{"prompt": f"{number}: ", "chosen": "yes", "rejected": "yet"} for number in range(8)]
    tokenizer = merging(tmp_path)
    more = ["--tokenizer", tokenizer, *more]
    done = precompute(run, model_folder, rows, tmp_path, "--show", 1, *more)
    assert done.code == 1 and "pairs/train, row 0:" in done.out and "\n    ‖ yes<|im_end|>\n" in done.out
    assert "pairs of pairs/train (row 0, 1, 2, …) start early" in done.err
    assert "Look at some rows with --show 3." in done.err and "--early-answers keep" in done.err
    kept = precompute(run, model_folder, rows, tmp_path, "--early-answers", "keep", *more)
    assert kept.code == 0 and re.search(r"answer starts early +8 \(row 0, 1, 2, …\)", kept.out)
    (path,) = tmp_path.rglob("manifest.json")
    assert json.loads(path.read_text())["source"]["early_answers"] == "keep"
