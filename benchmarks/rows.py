"""What the benchmarks beside TRL share: the rows that both sides read, how a side is run, and how figures are
shown.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpo_cache.data import detect_format, read_dataset
from dpo_cache.data.formats import Example, parse_row

HERE = Path(__file__).parent


def write_rows(data: str, limit: int | None, path: Path) -> int:
    """The rows as prompt, chosen and rejected, which TRL reads too; those with equal answers are left out."""
    rows = list(next(iter(read_dataset(data, limit=limit).values())))
    data_format = detect_format(list(rows[0]), rows[0])
    examples = [
        example for example in (parse_row(row, data_format) for row in rows) if isinstance(example, Example)
    ]
    kept = [example for example in examples if example.answers[0] != example.answers[1]]
    lines = [
        json.dumps({"prompt": example.prompt, "chosen": example.answers[0], "rejected": example.answers[1]})
        for example in kept
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def run(python: str, script: str, arguments: list[str], out: Path, options: list[str]) -> dict[str, Any]:
    """What a script beside this one writes to `out`, run in a process of its own."""
    done = subprocess.run(
        [python, str(HERE / script), *arguments, str(out), *options], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def show(label: str, values: list[float], form: str) -> None:
    """A line with the median of the turns, and the smallest and largest of them."""
    written = form.format
    print(
        f"  {label:48} {written(statistics.median(values))}   ({written(min(values))} to "
        f"{written(max(values))})"
    )
