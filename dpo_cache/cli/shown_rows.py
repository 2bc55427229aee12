"""Prints rows as they are scored, for `precompute --show`: plain text, in colors on a terminal.

    demo/train, row 0:
      prompt, 12 tokens
        <|im_start|>user\\n
        Well?<|im_end|>\\n
        <|im_start|>assistant\\n‖
      chosen, 3 tokens
        ‖Yes.<|im_end|>\\n
      rejected, 3 tokens
        ‖No.<|im_end|>\\n

‖ is the boundary: the tokens after it are scored. Line breaks are printed, after \\n. [cut: …] is left out
of the sequence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_cache.cli.output import count, print_text
from dpo_cache.errors import printable

if TYPE_CHECKING:
    from dpo_cache.data.shown_rows import ShownRow, ShownSide

MOST_LETTERS = 2000  # characters of a text; only the start and the end of a longer one are printed
EARLY = "the answer starts early: tokens merge across the end of the prompt"

Piece = tuple[str, str]  # a text, and its style on a terminal
Line = list[Piece]
MARK: Piece = ("‖", "bold red")


def print_rows(pair_set: str, rows: Sequence[ShownRow]) -> None:
    """Print the rows to stdout, in colors if that is a terminal."""
    lines = [line for row in rows for line in _lines(pair_set, row)]
    if not sys.stdout.isatty():
        for line in lines:
            print_text("".join(text for text, _ in line))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text.assemble(*line))


def _lines(pair_set: str, row: ShownRow) -> Iterator[Line]:
    dropped = f": dropped, {row.dropped}" if row.dropped else ":"
    yield [(printable(f"{pair_set}, row {row.row}{dropped}"), "bold")]
    for note in (*row.notes, *([EARLY] if row.moved_boundary else [])):
        yield [("  note: ", "yellow"), (printable(note), "")]
    sides = {"chosen": row.chosen, "rejected": row.rejected}
    is_same = len({(side.cut_before, side.prompt) for side in sides.values()}) == 1
    if is_same:
        yield from _prompt("prompt", row.chosen, row.special_tokens)
    for name, side in sides.items():
        if not is_same:
            yield from _prompt(f"prompt of {name}", side, row.special_tokens)
        yield from _answer(name, side, row.special_tokens)


def _prompt(title: str, side: ShownSide, special_tokens: Sequence[str]) -> Iterator[Line]:
    cut, kept, _, _ = side.num_tokens
    if cut + kept:
        yield [(f"  {title}, {_tokens(kept)}{_cut_off(cut)}", "bold")]
        yield from _block([*_cut(side.cut_before), *_marked(side.prompt, special_tokens), MARK])


def _answer(name: str, side: ShownSide, special_tokens: Sequence[str]) -> Iterator[Line]:
    _, _, kept, cut = side.num_tokens
    if cut + kept:
        yield [(f"  {name}, {_tokens(kept)}{_cut_off(cut)}", "bold")]
        yield from _block([MARK, *_marked(side.answer, special_tokens), *_cut(side.cut_after)])


def _tokens(number: int) -> str:
    return f"{count(number)} token{'s' if number != 1 else ''}"


def _cut_off(number: int) -> str:
    return f", {_tokens(number)} cut off" if number else ""


def _cut(text: str) -> Line:
    shown = _shortened(text)
    if shown.endswith("\n"):
        shown = shown[:-1] + "\\n"  # the bracket closes on the same line
    return [("[cut: ", "dim red"), (shown, "dim"), ("]", "dim red")] if text else []


def _marked(text: str, special_tokens: Sequence[str]) -> Line:
    """The text in pieces; special tokens have their own style."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    pieces = re.split(f"({pattern})", _shortened(text))
    return [(piece, "cyan" if place % 2 else "") for place, piece in enumerate(pieces) if piece]


def _shortened(text: str) -> str:
    if len(text) <= MOST_LETTERS:
        return text
    half = MOST_LETTERS // 2
    return f"{text[:half]}[… {count(len(text) - 2 * half)} letters …]{text[-half:]}"


def _block(pieces: Line) -> Iterator[Line]:
    """The pieces in lines, each ending where the text has a line break, which is shown as \\n."""
    line: Line = [("    ", "")]
    for text, style in pieces:
        *ended, last = text.split("\n")
        for part in ended:
            yield [*line, (printable(part), style), ("\\n", "dim")]
            line = [("    ", "")]
        line.append((printable(last), style))
    if any(text for text, _ in line[1:]):
        yield line
