"""The line fits its terminal, and other libraries' bars become details of it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console
from tqdm import tqdm

from dpo_cache.terminal import MIN_BAR, LibraryLines, Shown, TerminalLine, fit, wrapped

TRAINING = Shown(
    "step 12,345/1,000,000",
    0.5,
    ("loss 0.6931", "accuracy 100.0%", "margin +0.1234", "12.34 pairs/s", "78.12 GB"),
    "123 h 59 min left",
)


@pytest.mark.parametrize("width", [60, 79, 80, 100, 120, 200])
def test_label_position_bar_and_time_left_are_never_cut(width: int) -> None:
    before, bar, after = fit(width, "training", TRAINING)
    assert before == "training  step 12,345/1,000,000" and after.endswith("123 h 59 min left")
    assert bar >= (MIN_BAR if width >= 64 else 1) and len(before) + bar + len(after) + 4 <= width


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (50, "training  step 12,345/1,000,000  123 h 59 min left"),
        (49, "step 12,345/1,000,000  123 h 59 min left"),
        (40, "step 12,345/1,000,000  123 h 59 min left"),
        (39, "step 12,345/1,000,000"),
        (21, "step 12,345/1,000,000"),
        (12, "step 12,345/"),
    ],
)
def test_a_narrow_terminal_keeps_the_position(width: int, shown: str) -> None:
    with opened("training") as (line, _):
        line.update(TRAINING)
        text = rendered(line, width).split("\n")[0]
    assert text.replace("━", "").replace("╸", "").split() == shown.split() and len(text) <= width


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four five", ["one two three four", "five"]),
        ("  one two three fours five", ["  one two three", "  fours five"]),
        ("first\nRun `dpo-cache verify CACHE`, then stop", ["first", "Run", "`dpo-cache verify CACHE`,", "then stop"]),
        ("/a/path/without/any/space/in/it is long", ["/a/path/without/any/space/in/it", "is long"]),
        ("a cache. Next: dpo-cache ls --cache /a/b", ["a cache. Next:", "dpo-cache ls --cache /a/b"]),
        ("  dpo-cache ls --cache /a/b/c", ["  dpo-cache ls --cache /a/b/c"]),
        ("eval: loss 0.5  margin +0.1", ["eval: loss 0.5", "margin +0.1"]),
        ("学习率学习率 学习率 学习率", ["学习率学习率 学习率", "学习率"]),
        ("", [""]),
    ],
)  # fmt: skip
def test_lines_are_wrapped_between_words_and_never_in_a_command(text: str, lines: list[str]) -> None:
    assert wrapped(text, 20).split("\n") == lines
    assert wrapped(text, None) == wrapped(text, 8) == text  # no terminal, or one too narrow to wrap for


def test_details_are_left_out_from_the_last() -> None:
    shown = [fit(width, "training", TRAINING)[2].split("  ")[:-1] for width in range(60, 200)]
    assert shown[0] == [] and shown[-1] == list(TRAINING.details)
    assert all(found == list(TRAINING.details[: len(found)]) for found in shown)
    assert fit(80, "training", TRAINING)[2] == "loss 0.6931  123 h 59 min left"


def test_wide_letters_count_twice() -> None:
    shown = Shown("run 1/2", 0.5, ("学习率" * 4,), "3.0 s left")
    _, bar, after = fit(70, "sweep", shown)
    assert "学习率" in after and bar == 70 - len("sweep  run 1/2") - (24 + 2 + len("3.0 s left")) - 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rendered(line: TerminalLine, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(line)
    return console.file.getvalue()  # type: ignore[attr-defined]


@contextmanager
def opened(label: str = "scoring", **more: Any) -> Iterator[tuple[TerminalLine, Terminal]]:
    """A line on a terminal; afterwards stderr is as before."""
    before, sys.stderr = sys.stderr, Terminal()  # a fixture's would be reset by pytest
    terminal = sys.stderr
    try:
        line = TerminalLine(label, **more)
        try:
            yield line, terminal
        finally:
            line.close()
        assert sys.stderr is terminal
    finally:
        sys.stderr = before


def test_a_phase_is_shown_in_place_of_counted_progress() -> None:
    now = [0.0]
    with opened(clock=lambda: now[0]) as (line, _):
        assert rendered(line).startswith("scoring  starting  ")
        line.phase("loading the model")
        now[0] = 12.4
        assert rendered(line).startswith("scoring  loading the model  ") and line.shown().left == "12 s"
        line.phase(None)
        line.update(Shown("34%", 0.34, ("5 pairs/s",), "3.0 s left"))
        assert rendered(line).rstrip().endswith("5 pairs/s  3.0 s left")
        line.phase("saving")
        assert line.shown().position == "34%  saving" and line.shown().share is None


def test_a_bar_of_a_library_is_a_detail_of_the_phase() -> None:
    with opened() as (line, terminal):
        line.phase("tokenizing")
        bar = tqdm(total=200, desc="Map", file=sys.stderr, mininterval=0, miniters=1, disable=False)
        bar.update(68)
        assert line.shown().share == 0.34 and line.shown().details == ("68/200", "Map")
        bar.update(132)
        bar.close()
        sys.stderr.write("a warning\n")
        line.phase(None)
        assert line.shown().details == ()
    assert "a warning" in terminal.getvalue() and "it/s" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (["one\n", "two\n"], ["one", "two"]),
        (["on", "e\ntw", "o\n"], ["one", "two"]),
        (["windows\r\n"], ["windows"]),
        (["\rLoading: 3%|  | 1/9 [00:00<?]", "\rLoading: 9/9", "\n", "after\n"], ["after"]),
        (["\n\n\x1b[A\x1b[A", "\x1b[31mred\x1b[0m\n"], ["red"]),
    ],
)
def test_lines_pass_and_bars_do_not(written: list[str], shown: list[str]) -> None:
    found: list[str] = []
    stream = LibraryLines(found.append, lambda _: None).over(Terminal())
    for text in written:
        assert stream.write(text) == len(text)
    assert found == shown and stream.isatty()


@pytest.mark.parametrize(
    ("bar", "share", "details"),
    [
        ("\rMap:  34%|███▍      | 54/160 [00:00<00:01, 49.25 examples/s]", 0.34, ("54/160", "Map")),
        ("\r 50%|#####     | 1/2 [00:00<?, ?it/s]", 0.5, ("1/2", "")),
        ("\rmodel.safetensors:  2%|▏ | 21.0M/1.2G [00:04<03:10, 5MB/s]", 0.02, ("21.0M/1.2G", "model.safetensors")),
        ("\rGenerating train split: 160 examples [00:00, 9 examples/s]", None, ("160 examples", "Generating train split")),
        ("\rWriting model shards: 100%|██| 3/3 [00:01<00:00,  2.3it/s]", 1.0, ("3/3", "Writing model shards")),
    ],
)  # fmt: skip
def test_the_count_of_a_bar_is_read(bar: str, share: float | None, details: tuple[str, str]) -> None:
    with opened() as (line, _):
        line.phase("reading")
        sys.stderr.write(bar)
        assert (line.shown().share, line.shown().details) == (share, details)
