"""Read a cache with nothing of the package: JSON, hashlib and DuckDB, as docs/format.md describes the files.

contents = read_cache(root)
contents.faults                    # what docs/format.md forbids, a line each; empty for a sound cache
contents.scores[reference][key]    # token log-probs
contents.pair_sets["NAME/SPLIT"]   # the manifest, and every row
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

FORMAT = b'{\n  "format": "dpo-cache",\n  "version": 1\n}\n'
SIDES = ("chosen", "rejected")
Row = dict[str, Any]

# DuckDB reads each content once: most files are the same in thousands of caches
_known: dict[str, tuple[Row, ...]] = {}


@dataclass
class Contents:
    """All that a cache holds."""

    references: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> identity
    scores: dict[str, dict[bytes, tuple[float, ...]]] = field(default_factory=dict)  # id -> key -> log-probs
    pair_sets: dict[str, dict[str, Any]] = field(default_factory=dict)  # NAME/SPLIT -> manifest and rows
    faults: list[str] = field(default_factory=list)

    def scores_in_pairs(self, reference: str) -> dict[bytes, tuple[float, ...]]:
        """Key -> log-probs of the completions in pair sets that the reference scored."""
        return {
            row[f"{side}_key"]: row[f"ref_{side}_token_logps"]
            for pair_set in self.pair_sets.values()
            for row in pair_set["rows"]
            for side in SIDES
            if pair_set["manifest"]["reference"] == reference
        }


def read_cache(root: Path) -> Contents:
    """Everything that is visible in the cache; nothing where there is no cache."""
    contents = Contents()
    if not (root / "format.json").exists():
        return contents
    if (root / "format.json").read_bytes() != FORMAT:
        contents.faults.append("format.json: another content")
    for folder in sorted(root.glob("references/*")):
        _read_reference(folder, contents)
    for manifest in sorted(root.glob("pairs/*/*/manifest.json")):
        _read_pair_set(manifest, contents)
    return contents


def _read_reference(folder: Path, contents: Contents) -> None:
    reference = folder.name
    if (folder / "reference.json").exists():
        document = _read_document(folder / "reference.json", contents)
        if document is not None:
            contents.references[reference] = document["identity"]
            if _digest(document["identity"]) != reference:
                contents.faults.append(f"reference {reference[:8]}: its identity has another digest")
    scores = contents.scores.setdefault(reference, {})
    for shard in sorted(folder.glob("scores/[!.]*")):
        rows = _read_rows(shard, contents)
        if len({row["key"] for row in rows}) != len(rows):
            contents.faults.append(f"shard {shard.name[:8]}: a key occurs twice")
        for row in rows:
            if problem := _problem_of_values(row["num_tokens"], row["logps"], row["token_logps"]):
                contents.faults.append(f"shard {shard.name[:8]}: {problem}")
            if scores.setdefault(row["key"], row["token_logps"]) != row["token_logps"]:
                contents.faults.append(f"shard {shard.name[:8]}: another value than in an earlier shard")


def _read_pair_set(file: Path, contents: Contents) -> None:
    name = f"{file.parent.parent.name}/{file.parent.name}"
    manifest = _read_document(file, contents)
    if manifest is None:
        return
    rows: list[Row] = []
    for part in manifest["parts"]:
        path = file.with_name(part["file"])
        if not path.is_file():
            contents.faults.append(f"pair set {name}: part {part['file'][:8]} is not there")
            continue
        found = _read_rows(path, contents)
        if (len(found), path.stat().st_size) != (part["rows"], part["bytes"]):
            contents.faults.append(f"pair set {name}: part {part['file'][:8]} has other rows or bytes")
        rows += found
    digest = hashlib.sha256(b"dpo-cache pairs/1")
    for row in rows:
        digest.update(struct.pack("<q", row["row"]) + row["chosen_key"] + row["rejected_key"])
        contents.faults += [f"pair set {name}: {problem}" for problem in _problems_of_pair(row)]
    if (manifest["num_pairs"], manifest["pairs_digest"]) != (len(rows), digest.hexdigest()):
        contents.faults.append(f"pair set {name}: its parts hold other pairs than the manifest promises")
    if manifest["reference"] not in contents.references:
        contents.faults.append(f"pair set {name}: its reference has no entry")
    contents.pair_sets[name] = {"manifest": manifest, "rows": rows}


def _problems_of_pair(row: Row) -> list[str]:
    prompts = {"chosen": row["prompt_ids"], "rejected": row["rejected_prompt_ids"] or row["prompt_ids"]}
    problems = []
    for side in SIDES:
        if row[f"{side}_key"] != completion_key(prompts[side], row[f"{side}_ids"]):
            problems.append(f"row {row['row']}: another key")
        if len(row[f"{side}_ids"]) != row[f"{side}_num_tokens"]:
            problems.append(f"row {row['row']}: another number of ids")
        values = (row[f"{side}_num_tokens"], row[f"ref_{side}_logps"], row[f"ref_{side}_token_logps"])
        if problem := _problem_of_values(*values):
            problems.append(f"row {row['row']}: {problem}")
    return problems


def _problem_of_values(num_tokens: int, logps: float, token_logps: tuple[float, ...]) -> str | None:
    if len(token_logps) != num_tokens or not num_tokens or not all(map(math.isfinite, token_logps)):
        return "log-probs that are not finite, or not one a token"
    total = math.fsum(token_logps)
    return None if abs(total - logps) <= 1e-9 + 1e-9 * abs(total) else "a sum that is another one"


def completion_key(prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> bytes:
    """The key of a completion, from the definition."""
    numbers = (len(prompt_ids), *prompt_ids, *completion_ids)
    content = struct.pack(f"<{len(numbers)}I", *numbers)
    return hashlib.blake2b(content, digest_size=16, person=b"dpo-cache/1").digest()


def _read_rows(file: Path, contents: Contents) -> tuple[Row, ...]:
    """The rows of a Parquet file; none, and a fault, where its bytes do not hash to its name."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if f"{digest}.parquet" != file.name:
        contents.faults.append(f"{file.parent.name}/{file.name[:8]}: hashes to {digest[:8]}")
        return ()
    if digest not in _known:
        result = duckdb.execute("select * from read_parquet($1)", [str(file)])
        names = [column[0] for column in result.description]
        _known[digest] = tuple(
            {name: _plain(value) for name, value in zip(names, values, strict=True)}
            for values in result.fetchall()
        )
    return _known[digest]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read_document(file: Path, contents: Contents) -> dict[str, Any] | None:
    """A sealed document without its seal; None, and a fault, for any other spelling than the valid one."""
    content = file.read_bytes()
    document = json.loads(content)
    rendered = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    seal = document.pop("sha256", None)
    if rendered.encode() != content or seal != _digest(document):
        contents.faults.append(f"{file.parent.name}/{file.name}: not sealed")
        return None
    return document


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
