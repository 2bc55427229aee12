"""A progress line on a terminal, which fits its width:

    training  step 12/400  ━━━━━╸━━━━━━━  loss 0.6712  accuracy 58.3%  2 min 4 s left
    scoring  loading the model  ━━━━━━╸━━━━━━━  Loading weights  112/290  12.3 s

Position, label and time left are shown before the bar and details, as far as there is room for them. Progress
bars of other libraries are not shown: while a phase is reported, their count is a detail of this line.

Remarks are wrapped to the terminal between words. Commands, and anything between backticks, are never broken,
because a user may copy them.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

from dpo_cache.errors import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

MIN_BAR, MAX_BAR = 10, 40
GAP = "  "
MIN_WRAPPED = 20  # columns; a narrower terminal wraps by itself
UNBROKEN = re.compile(r"\S*`[^`\n]*`\S*|\S+")
COMMAND = re.compile(r"(?:^\s*|(?<=: ))dpo-cache [a-z].*$")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# lines of tqdm: `Map:  34%|███▍      | 54/160 [00:00<00:01, 49.25 examples/s]`, and of a bar without an end,
# `Generating train split: 160 examples [00:00, 14071.89 examples/s]`
LIBRARY_BAR = re.compile(
    r"(?:(?P<name>\D.*?):?\s+)?(?:(?P<percent>\d+)%\|.*\|\s*)?(?P<count>\d\S*(?: [a-z]+)?)\s*\[.*"
)


@dataclass(frozen=True)
class Shown:
    """The content of a line, without its label. `share` is None where the end is not known."""

    position: str = ""
    share: float | None = 0.0
    details: tuple[str, ...] = ()  # the first is the most important
    left: str = ""


def fit(width: int, label: str, shown: Shown) -> tuple[str, int, str]:
    """The text before the bar, the width of the bar, and the text after it, `width` characters in all.

    Details that do not fit are left out, from the last to the first; on a narrower terminal the bar as well,
    then the label, then the time left. The end of a position that does not fit is cut off.
    """
    if _length([label, shown.position, shown.left]) > width and shown.position:
        label = ""
    if _length([shown.position, shown.left]) > width and shown.position:
        shown = replace(shown, left="")
    before = GAP.join(filter(None, (label, shown.position)))
    kept: list[str] = []
    for detail in filter(None, shown.details):
        if _length([before, "━" * MIN_BAR, *kept, detail, shown.left]) > width:
            break
        kept.append(detail)
    after = GAP.join(filter(None, [*kept, shown.left]))
    return before, max(0, min(MAX_BAR, width - _length([before, after]) - len(GAP))), after


def _length(texts: Iterable[str]) -> int:
    """How many columns the texts take, with gaps between them."""
    return _length_of(GAP.join(filter(None, texts)))


def wrapped(text: str, width: int | None) -> str:
    """The text with its lines wrapped between words; None: no terminal, and the text is as it is."""
    if width is None or width < MIN_WRAPPED:
        return text
    return "\n".join(part for line in text.split("\n") for part in _wrap_line(line, width))


def terminal_width() -> int | None:
    """The columns of the terminal on stderr; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    if (columns := os.environ.get("COLUMNS", "")).isdecimal():
        return int(columns)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return None


def _wrap_line(line: str, width: int) -> list[str]:
    """The parts of a line; those after the first are indented as it is."""
    if len(line) <= width and line.isascii():
        return [line]
    columns = line.strip().split(GAP)
    if len(columns) > 1 and all(_length_of(column) <= width for column in columns):
        gap, words = GAP, columns  # such as metrics: each name stays with its value
    else:
        command = COMMAND.search(line)
        gap, words = " ", UNBROKEN.findall(line[: command.start()] if command else line)
        words += [command[0].strip()] if command else []
    indent = line[: len(line) - len(line.lstrip(" "))]
    parts, part = [], ""
    for word in words:
        if part and _length_of(f"{indent}{part}{gap}{word}") > width:
            parts.append(indent + part)
            part = word
        else:
            part = f"{part}{gap}{word}" if part else word
    return [*parts, indent + part]


def _length_of(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


class TerminalLine:
    """The line on stderr, redrawn ten times a second until it is closed."""

    def __init__(self, label: str, *, clock: Callable[[], float] = time.monotonic):
        from rich.console import Console
        from rich.live import Live

        self._label, self._clock = label, clock
        self._shown: Shown | None = None  # before the first update
        self._phase, self._phase_began = "", clock()
        self._library: Shown | None = None  # the bar of a library
        self._console = Console(file=sys.stderr)
        self._lines = LibraryLines(self.print, self._note_library)
        self._live = Live(
            self, console=self._console, transient=True, redirect_stderr=False, refresh_per_second=10
        )
        self.open()

    def open(self) -> None:
        """Show the line."""
        self._live.start(refresh=True)
        self._stderr, sys.stderr = sys.stderr, self._lines.over(sys.stderr)

    def close(self) -> None:
        """Hide the line."""
        if sys.stderr is self._lines:
            sys.stderr = self._stderr
        self._live.stop()

    def update(self, shown: Shown) -> None:
        """Show how far the work is."""
        self._shown = shown

    def phase(self, text: str | None) -> None:
        """Show what is done now in place of counted progress; None: counted progress again."""
        self._phase, self._phase_began, self._library = text or "", self._clock(), None

    def print(self, text: str) -> None:
        """Print a text above the line, wrapped to the terminal."""
        text = wrapped(printable_lines(text), self._console.width)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def shown(self) -> Shown:
        """What the line shows now."""
        if not self._phase:
            return self._shown or Shown("starting", share=None)
        from_library = self._library or Shown(share=None)
        before = self._shown.position if self._shown else ""
        position = GAP.join(filter(None, (before, self._phase)))
        return replace(from_library, position=position, left=f"{self._clock() - self._phase_began:.0f} s")

    def _note_library(self, text: str) -> None:
        match = LIBRARY_BAR.fullmatch(text.strip())
        if match:
            share = None if match["percent"] is None else int(match["percent"]) / 100
            self._library = Shown(share=share, details=(match["count"], printable(match["name"] or "")))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.segment import Segment

        shown, width = self.shown(), options.max_width
        before, bar_width, after = fit(width, self._label, shown)
        segments = [Segment(f"{before}{GAP if bar_width else ''}")]
        if bar_width:
            share = shown.share
            bar = ProgressBar(1, min(share or 0.0, 1.0), width=bar_width, pulse=share is None)
            segments += console.render(bar, options)
        segments.append(Segment(f"{GAP}{after}" if after else ""))
        yield from Segment.adjust_line_length(segments, width)


class LibraryLines(io.TextIOBase):
    """A stream in place of stderr: `show` gets each line, and `note` the state of each bar.

    A library draws its bar again and again after a carriage return; such a line is never shown.
    """

    def __init__(self, show: Callable[[str], None], note: Callable[[str], None]):
        self._show, self._note = show, note
        self._waiting, self._is_bar = "", False

    def over(self, stream: TextIO) -> LibraryLines:
        """This stream, in place of the other one, whose terminal it has."""
        self._stream = stream
        return self

    def write(self, text: str) -> int:
        for piece in re.split(r"([\r\n])", ESCAPES.sub("", text.replace("\r\n", "\n"))):
            if piece == "\n":
                self._end_line()
            elif piece == "\r":
                self._waiting, self._is_bar = "", True
            else:
                self._waiting += piece
        if self._is_bar and self._waiting:
            self._note(self._waiting)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def _end_line(self) -> None:
        waiting, is_bar = self._waiting, self._is_bar
        self._waiting, self._is_bar = "", False
        if not is_bar and waiting:
            self._show(waiting)
