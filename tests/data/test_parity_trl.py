"""Token ids of rows under the templates of checkpoints.py and with the tokenizers of kinds.py, compared with TRL
1.16's own: live where TRL is installed, from golden values elsewhere.

DPO_CACHE_TRL_PYTHON=.venv-trl/bin/python python -m pytest tests/data/test_parity_trl.py
python -m tests.data.test_parity_trl .venv-trl/bin/python     # writes the golden values anew

The golden file has TRL's ids decoded, and a digest of the ids; or the error that TRL raises. We differ on purpose
in two things. Where a template leaves out tool calls, TRL trains on what is left, and we refuse the row. Where a
text begins with the BOS token and the tokenizer adds one, TRL has two and we have one (test_render.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.data.left_out import CALLS_LEFT_OUT
from tests.data.checkpoints import FAMILIES, rows_of, save_checkpoint
from tests.data.conftest import write_lines
from tests.data.kinds import CHAT_ROWS, KINDS, TEXT_ROWS

GOLDEN = Path(__file__).parent / "golden" / "trl-1.16.json"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trl_rows.py"
SIDES = ("prompt", "chosen", "rejected")


def run_trl(python: str, folder: Path) -> dict[str, Any]:
    """What TRL makes of the rows of each family and kind, in the form of the golden file."""
    cases = [
        {"name": name, "tokenizer": save_checkpoint(name, folder / name), "rows": clean_rows(name)}
        for name in FAMILIES
    ]
    for name in KINDS:
        KINDS[name]().save_pretrained(folder / name)
        for rows in (TEXT_ROWS, CHAT_ROWS):
            cases.append({"name": name, "tokenizer": str(folder / name), "rows": list(rows.values())})
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, str(SCRIPT), str(folder), str(folder / "out.json")],
        check=True,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    found = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    for name, made in found["cases"].items():
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        rows = rows_of(name) if name in FAMILIES else {**TEXT_ROWS, **CHAT_ROWS}
        found["cases"][name] = {
            row: ids if "error" in ids else shown(ids, tokenizer) for row, ids in zip(rows, made, strict=True)
        }
    return found


def clean_rows(family: str) -> list[Any]:
    """The rows as TRL needs them: it does not find out that a template needs arguments as text."""
    rows = list(rows_of(family).values())
    return [with_text_arguments(row) for row in rows] if FAMILIES[family].needs_text else rows


def with_text_arguments(value: Any) -> Any:
    if isinstance(value, list):
        return [with_text_arguments(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: json.dumps(part) if name == "arguments" else with_text_arguments(part)
        for name, part in value.items()
    }


def expected_of(family: str, row: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What TRL makes of the row, with errors as we report them."""
    if "error" in theirs:
        return {"error": f"the chat template refuses it ({theirs['error']})"}
    has_calls = any("tool_calls" in message for side in SIDES for message in row[side])
    return {"error": CALLS_LEFT_OUT} if has_calls and not FAMILIES[family].writes_calls else theirs


def shown(ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    texts = {side: tokenizer.decode(ids[side]) for side in SIDES}
    return {**texts, "ids": hashlib.sha256(str([ids[side] for side in SIDES]).encode()).hexdigest()[:16]}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = os.environ.get("DPO_CACHE_TRL_PYTHON")
    if python:
        return run_trl(python, tmp_path_factory.mktemp("trl"))
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def tokenized(
    rows: dict[str, dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    day: str,
    *,
    is_streamed: bool,
) -> dict[str, Any]:
    """What we make of the rows, read from a file, in the form of the golden file."""
    place = write_lines(folder / "rows.jsonl", list(rows.values()))
    (table,) = data.read_dataset(place, streaming=is_streamed).values()
    data_format = data.detect_format(list(rows[next(iter(rows))]), rows[next(iter(rows))])
    windows = data.tokenized_windows(
        table, data_format, tokenizer, ranked_pairs="all", window_rows=100, spool=folder / "spool",
        place=place, on_error="drop", template_date=date.fromisoformat(day),
    )  # fmt: skip
    found: dict[str, Any] = {}
    for name, one in zip(rows, (row for window in windows for row in window), strict=True):
        ids = {side: one[f"{side}_ids"] for side in SIDES}
        found[name] = {"error": one["problem"]} if one["problem"] else shown(ids, tokenizer)
    return found


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_under_a_familys_template_are_those_of_trl(
    family: str, is_streamed: bool, theirs: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = data.load_tokenizer(save_checkpoint(family, tmp_path / "model"))
    rows, expected = rows_of(family), theirs["cases"][family]
    assert tokenized(rows, tokenizer, tmp_path, theirs["date"], is_streamed=is_streamed) == {
        name: expected_of(family, row, expected[name]) for name, row in rows.items()
    }


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")  # transformers, for the Python tokenizer
@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS], ids=["text", "conversation"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_each_kind_of_tokenizer_are_those_of_trl(
    kind: str, rows: dict[str, dict[str, Any]], theirs: dict[str, Any], tmp_path: Path
) -> None:
    KINDS[kind]().save_pretrained(tmp_path / "model")
    tokenizer = data.load_tokenizer(str(tmp_path / "model"))
    expected = theirs["cases"][kind]
    assert tokenized(rows, tokenizer, tmp_path, theirs["date"], is_streamed=False) == {
        name: expected[name] for name in rows
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder_name:
        golden = run_trl(sys.argv[1], Path(folder_name))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
