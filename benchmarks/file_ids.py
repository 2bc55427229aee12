"""Compare the token ids that dpo-cache makes of files as they are with those that TRL 1.16 makes of clean rows.

    file_ids.py --tokenizer MODEL --trl-python PYTHON FILE...

Each file is read as `dpo-cache precompute` reads it without options. FILE.clean.jsonl has its pairs as TRL reads
them, cleaned without dpo-cache: `row`, the number of the row in the file (from 0), and prompt, chosen, rejected,
tools. Rows that only one side has are counted, with our reasons. The exit code is 1 if an id differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

Pairs = dict[int, list[list[list[int]]]]  # by row: prompt, chosen and rejected ids of each pair
SIDES = ("prompt", "chosen", "rejected")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("files", nargs="+")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "hf")  # `datasets` must not reuse earlier results
        theirs = trl_pairs(arguments.files, arguments.tokenizer, arguments.trl_python, folder)
        agreeing = [compare(file, theirs[file], arguments.tokenizer) for file in arguments.files]
    return 0 if all(agreeing) else 1


def trl_pairs(files: list[str], tokenizer: str, python: str, folder: Path) -> dict[str, Pairs]:
    rows = {
        file: [
            json.loads(line) for line in Path(f"{file}.clean.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for file in files
    }
    cases = [{"name": file, "tokenizer": tokenizer, "rows": clean} for file, clean in rows.items()]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    script, out = str(Path(__file__).with_name("trl_rows.py")), folder / "trl.json"
    subprocess.run([python, script, str(folder), str(out)], check=True, stderr=subprocess.DEVNULL)
    found: dict[str, Pairs] = {}
    for file, made in json.loads(out.read_text(encoding="utf-8"))["cases"].items():
        pairs: Pairs = defaultdict(list)
        for row, ids in zip(rows[file], made, strict=True):
            assert "error" not in ids, (file, row["row"], ids)
            pairs[row["row"]].append([ids[side] for side in SIDES])
        found[file] = dict(pairs)
    return found


def compare(file: str, theirs: Pairs, tokenizer_location: str) -> bool:
    """Print what is found of a file, and return whether no pair that both sides have differs."""
    from dpo_cache import data  # after HF_HOME is set
    from dpo_cache.errors import DpoCacheError

    tokenizer, remarks = data.load_tokenizer(tokenizer_location), []
    try:
        (rows,) = data.read_dataset(file).values()
        columns, first = list(rows.column_names), next(iter(rows))
        data_format = data.detect_format(columns, first, file)
        tokenized = data.tokenize_rows(
            rows, data_format, tokenizer, place=file, on_error="drop", log=remarks.append
        )
    except DpoCacheError as error:
        print(f"{file}: refused: {error}", flush=True)
        return True
    ours: Pairs = defaultdict(list)
    without: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for one in tokenized:
        notes.update(one["notes"])
        if reason := one["problem"] or one["dropped"]:
            without[reason] += 1
        else:
            ours[one["row"]].append([one[f"{side}_ids"] for side in SIDES])
    both = ours.keys() & theirs.keys()
    wrong = sorted(row for row in both if ours[row] != theirs[row])
    moved = sum(tokenized["moved_boundary"])
    print(
        f"{file}: {len(rows)} rows, {data_format}: {len(both) - len(wrong)} rows have the same ids, "
        f"{len(wrong)} differ{f', first {wrong[:3]}' if wrong else ''}; {moved} begin early; only dpo-cache "
        f"has {len(ours.keys() - both)}, only the clean rows {len(theirs.keys() - both)}"
    )
    for kind, counted in (("no pair", without), ("note", notes)):
        for reason, count in counted.items():
            print(f"    {kind}: {count} rows: {reason}")
    return not wrong and not (ours.keys() - both)


if __name__ == "__main__":
    sys.exit(main())
