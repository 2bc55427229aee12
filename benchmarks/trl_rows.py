"""Token ids that TRL 1.16 makes of rows: `python trl_rows.py FOLDER OUT.json`, where TRL is installed.

FOLDER/cases.json is a list of {"name", "tokenizer": a folder, "rows": a list}; those of one name are joined. TRL's own `_prepare_dataset` is
called on a trainer without its `__init__`, and on rows that are plain objects: in a `Dataset`, fields that only
some messages have would become nulls in all of them. This file imports nothing from dpo-cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import DPOTrainer


class Rows(list):
    """Rows with the methods of a data set that TRL calls."""

    def map(self, change: Callable[..., dict[str, Any]], fn_kwargs: Any = None, **_: Any) -> Rows:
        return Rows({**row, **change(dict(row), **(fn_kwargs or {}))} for row in self)


def prepare(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The ids of prompt, chosen and rejected, or the error that TRL raises."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    settings = SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None)
    try:
        (found,) = DPOTrainer._prepare_dataset(trainer, Rows([row]), tokenizer, settings, "train")  # type: ignore[arg-type]
    except Exception as error:  # a chat template may raise anything
        return {"error": str(error)}
    return {name: list(found[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}


def main(folder: Path, out: Path) -> None:
    PartialState()
    found: dict[str, Any] = {"date": date.today().isoformat(), "cases": {}}
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"])
        found["cases"].setdefault(case["name"], []).extend(prepare(row, tokenizer) for row in case["rows"])
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
