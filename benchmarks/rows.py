"""Functions that the benchmarks share: reading rows, running one side in its own process, printing figures."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_cache.data import Example, detect_format, parse_row, read_dataset

HERE = Path(__file__).parent


def read_rows(data: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of the data set's first split."""
    return list(next(iter(read_dataset(data, limit=limit).values())))


def parse_rows(rows: list[dict[str, Any]]) -> dict[int, Example]:
    """The row number and the example of each row that makes a pair of two different answers."""
    data_format = detect_format(list(rows[0]), rows[0])
    examples = ((number, parse_row(row, data_format)) for number, row in enumerate(rows))
    return {
        number: example
        for number, example in examples
        if isinstance(example, Example) and example.answers[0] != example.answers[1]
    }


def columns(example: Example) -> dict[str, Any]:
    """The columns that TRL reads as well."""
    return {"prompt": example.prompt, "chosen": example.answers[0], "rejected": example.answers[1]}


def write_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Write a JSONL file, and return its number of lines."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def write_rows(data: str, limit: int | None, path: Path) -> int:
    """Write the pairs of a data set as a JSONL file, and return their number."""
    return write_lines(map(columns, parse_rows(read_rows(data, limit)).values()), path)


def run(python: str, script: str, arguments: list[str], out: Path, options: list[str]) -> dict[str, Any]:
    """Run a script of this folder in its own process, and return the JSON that it writes to `out`."""
    done = subprocess.run(
        [python, str(HERE / script), *arguments, str(out), *options], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def show(label: str, values: list[float], form: str) -> None:
    """Print the median of the turns, with the smallest and the largest."""
    written = form.format
    print(
        f"  {label:48} {written(statistics.median(values))}   ({written(min(values))} to "
        f"{written(max(values))})"
    )
