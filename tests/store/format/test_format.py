"""A reader of the golden caches that follows only docs/format.md, and other programs that read them. Nothing
here imports dpo_cache.

(The fixtures that every test file shares do; none is used.)
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

GOLDEN = Path(__file__).parents[2] / "golden"
CACHES = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
FORMAT_PAGE = (Path(__file__).parents[3] / "docs/format.md").read_text()

every_golden_cache = pytest.mark.parametrize("root", CACHES, ids=lambda path: path.name)


def completion_key(prompt: list[int], completion: list[int]) -> bytes:
    hashed = struct.pack(f"<{1 + len(prompt) + len(completion)}I", len(prompt), *prompt, *completion)
    return hashlib.blake2b(hashed, digest_size=16, person=b"dpo-cache/1").digest()


def canonical(value: Any) -> str:
    """Canonical JSON, spelled out by hand."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(name)}:{canonical(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        escapes = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        return (
            '"'
            + "".join(
                escapes.get(letter, f"\\u{ord(letter):04x}" if letter < " " else letter) for letter in value
            )
            + '"'
        )
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else repr(value)
    )


def indented(value: Any, level: int = 0) -> str:
    """The one spelling on disk."""
    if not value or not isinstance(value, dict | list):
        return canonical(value)
    inner = "\n" + "  " * (level + 1)
    if isinstance(value, dict):
        members = [f"{canonical(name)}: {indented(value[name], level + 1)}" for name in sorted(value)]
    else:
        members = [indented(item, level + 1) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return start + inner + f",{inner}".join(members) + "\n" + "  " * level + end


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def read_sealed(path: Path) -> Any:
    document = json.loads(path.read_bytes())
    assert path.read_bytes().decode() == indented(document) + "\n"
    seal = document.pop("sha256")
    assert seal == digest(document)
    return document


def read_rows(path: Path) -> list[dict[str, Any]]:
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".parquet"
    return pq.read_table(path).to_pylist()


def read_scores(root: Path) -> dict[bytes, list[float]]:
    rows = [row for path in root.glob("references/*/scores/*.parquet") for row in read_rows(path)]
    for row in rows:
        assert row["num_tokens"] == len(row["token_logps"])
        assert row["logps"] == pytest.approx(sum(row["token_logps"]), rel=1e-9, abs=1e-9)
    return {row["key"]: row["token_logps"] for row in rows}


def read_pairs(root: Path) -> list[dict[str, Any]]:
    (path,) = root.glob("pairs/*/*/manifest.json")
    manifest = read_sealed(path)
    assert (manifest["name"], manifest["split"]) == path.parts[-3:-1]
    rows = []
    for part in manifest["parts"]:
        assert (path.parent / part["file"]).stat().st_size == part["bytes"]
        rows += read_rows(path.parent / part["file"])
    assert len(rows) == manifest["num_pairs"] == sum(part["rows"] for part in manifest["parts"])
    running = hashlib.sha256(b"dpo-cache pairs/1")
    for row in rows:
        running.update(struct.pack("<q", row["row"]) + row["chosen_key"] + row["rejected_key"])
    assert running.hexdigest() == manifest["pairs_digest"]
    return rows


@every_golden_cache
def test_a_reader_from_the_page_alone_finds_every_key_seal_and_id_right(root: Path) -> None:
    (reference,) = (root / "references").iterdir()
    document = read_sealed(reference / "reference.json")
    assert digest(document["identity"]) == reference.name
    scores = read_scores(root)
    assert len(scores) == 3
    for row in read_pairs(root):
        rejected_prompt = (
            row["prompt_ids"] if row["rejected_prompt_ids"] is None else row["rejected_prompt_ids"]
        )
        for side, prompt in (("chosen", row["prompt_ids"]), ("rejected", rejected_prompt)):
            assert row[f"{side}_key"] == completion_key(prompt, row[f"{side}_ids"])
            assert row[f"ref_{side}_token_logps"] == scores[row[f"{side}_key"]]
            assert row[f"{side}_num_tokens"] == len(row[f"{side}_ids"])


@every_golden_cache
def test_the_columns_are_those_of_the_page(root: Path) -> None:
    (shard,) = root.glob("references/*/scores/*.parquet")
    (part,) = root.glob("pairs/*/*/*.parquet")
    assert "`" + "`, `".join(pq.read_schema(part).names) + "`" in FORMAT_PAGE.replace("\n", " ")
    assert all(f"| `{name}` |" in FORMAT_PAGE for name in pq.read_schema(shard).names)


def test_the_worked_example_of_the_page_is_right() -> None:
    hashed, key = FORMAT_PAGE.split("  hashed   ")[1].split("\n  ```")[0].split("\n  key      ")
    assert (
        hashlib.blake2b(bytes.fromhex(hashed), digest_size=16, person=b"dpo-cache/1").hexdigest()
        == key
        == completion_key([10, 11, 12], [20, 21]).hex()
    )


def test_the_format_file_of_the_page_is_that_of_the_caches() -> None:
    shown = FORMAT_PAGE.split("```json\n")[1].split("```")[0].encode()
    assert f"Exactly these {len(shown)} bytes" in FORMAT_PAGE
    assert all((root / "format.json").read_bytes() == shown for root in CACHES)


def test_canonical_json_by_hand_escapes_as_json_does() -> None:
    value = {"é\x01": ['\b\f\n\r\t"\\/\x7f', 1, -2.5, 1e22, True, None, {}, []], "a": {"b": {"c": [[]]}}}
    assert canonical(value) == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert indented(value) == json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False)


# -- other programs ----------------------------------------------------------------------------------------


def by_duckdb(path: Path, scratch: Path) -> list[dict[str, Any]]:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        result = connection.execute(f"select * from '{path}'")
        names = [column[0] for column in result.description]
        return [dict(zip(names, values, strict=True)) for values in result.fetchall()]


def by_polars(path: Path, scratch: Path) -> list[dict[str, Any]]:
    return pytest.importorskip("polars").read_parquet(path).to_dicts()


def by_datasets(path: Path, scratch: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(scratch)).to_list()


@every_golden_cache
@pytest.mark.parametrize("read", [by_duckdb, by_polars, by_datasets])
def test_other_programs_read_the_same_numbers(root: Path, read: Any, tmp_path: Path) -> None:
    for path in (*root.glob("references/*/scores/*.parquet"), *root.glob("pairs/*/*/*.parquet")):
        found = read(path, tmp_path)
        assert found == read_rows(path)
        assert len(found) in (2, 3)
