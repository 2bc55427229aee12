"""Compares the output of a command with the output that a page shows, up to numbers."""

from __future__ import annotations

import difflib
import re

_SAME = [
    (re.compile(r"\b\d{4}-\d\d-\d\d(T[\d:.+]+)?"), "DATE"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b…?|\b[0-9a-f]{4,}…"), "ID"),
    (re.compile(r"[\d.,]+ ([kMGT]i?)?B\b"), "SIZE"),
    (re.compile(r"\b(\d+ h )?(\d+ min )?\d[\d.]* (s|ms)\b|\b(\d+ h )?\d+ min\b"), "TIME"),
    (re.compile(r"(?<![A-Za-z_\d])[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?"), "N"),
    (re.compile(r"(?<=\s)-(?=\s|$)"), "N"),  # a share that is not known
    (re.compile(r"([─-])\1+"), r"\1"),
    (re.compile(r"\s+"), " "),
]


def normalized(line: str) -> str:
    """The line with numbers, sizes, times, ids and white space all alike."""
    for pattern, instead in _SAME:
        line = pattern.sub(instead, line)
    return line.strip()


def matched(shown: list[str], real: list[str]) -> list[int | None] | None:
    """For each line that is shown, the number of the real line that it stands for, or None for a line `...`.

    None if the two are not the same. A line `...` matches any number of real lines.
    """
    wanted, given = [normalized(line) for line in shown], [normalized(line) for line in real]
    places: list[int | None] = []
    segment_start, position = 0, 0
    while segment_start < len(wanted):
        if wanted[segment_start] == "...":
            places.append(None)
            segment_start += 1
            continue
        end = next((at for at in range(segment_start, len(wanted)) if wanted[at] == "..."), len(wanted))
        segment = wanted[segment_start:end]
        starts: range = range(position, len(given) - len(segment) + 1)
        if segment_start == 0:
            starts = starts[:1]
        elif end == len(wanted):
            starts = starts[-1:]
        found = next((at for at in starts if given[at : at + len(segment)] == segment), None)
        if found is None or (segment_start == 0 and end == len(wanted) and len(segment) != len(given)):
            return None
        places += range(found, found + len(segment))
        position = found + len(segment)
        segment_start = end
    ends_open = bool(wanted) and wanted[-1] == "..."
    return places if ends_open or position == len(given) else None


def renewed(shown: list[str], real: list[str]) -> list[str]:
    """The real lines; where the shown ones match them, lines `...` stay as they are."""
    places = matched(shown, real)
    if places is None:
        return real
    return [line if place is None else real[place] for line, place in zip(shown, places, strict=True)]


def difference(shown: list[str], real: list[str]) -> str:
    """A diff of the two, in which lines that differ only in numbers are the same."""
    pages, runs = [normalized(line) for line in shown], [normalized(line) for line in real]
    lines = []
    for group in difflib.SequenceMatcher(None, pages, runs, autojunk=False).get_grouped_opcodes(2):
        lines.append("@@")
        for kind, start, end, real_start, real_end in group:
            if kind == "equal":
                lines += [f"  {line}" for line in shown[start:end]]
            else:
                lines += [f"- {line}" for line in shown[start:end]]
                lines += [f"+ {line}" for line in real[real_start:real_end]]
    return "\n".join(lines)


def stripped(text: str) -> list[str]:
    """The lines of an output, without empty ones at its ends and spaces at the ends of lines."""
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    return lines
