"""The command that `verify --repair` tells makes the very pair set again that was lost."""

import shlex
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.cli import app as app_module
from dpo_cache.exchange import export_pairs, import_pairs
from dpo_cache.store import PairSet
from dpo_cache.store.upkeep.commands import precompute_line
from tests.conftest import write_rows
from tests.exchange.conftest import content, pairs_of


def run_again(cache: Path, name: str, empty: Path, monkeypatch: pytest.MonkeyPatch) -> PairSet:
    """What the command for this pair set puts into an empty cache."""
    opened = dpo_cache.open_cache(cache)
    manifest = opened.pairs(name).manifest
    line = precompute_line(str(empty), manifest, opened.read_reference(manifest["reference"]))
    monkeypatch.setattr("sys.argv", shlex.split(line))
    with pytest.raises(SystemExit) as leaving:
        app_module.main()
    assert leaving.value.code == 0
    return pairs_of(empty, name)


@pytest.mark.parametrize("name", ["chat", "text", "cut", "right", "ranked"])
def test_what_was_made_by_precompute(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    again = run_again(source / "cache", f"{name}/train", tmp_path / "again", monkeypatch)
    before = pairs_of(source / "cache", name)
    assert (
        again.manifest["pairs_digest"] == before.manifest["pairs_digest"]
        and again.reference_id == before.reference_id
    )


def test_columns_that_were_renamed_and_rows_that_were_added_since(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question it was": f"{number}?", "chosen": " yes", "rejected": f" no {number}"}
        for number in range(8)
    ]
    data = write_rows(tmp_path / "my pairs.jsonl", rows[:6])
    dpo_cache.precompute(
        model_folder, data, tmp_path / "cache", name="pairs", map=("prompt=question it was",), limit=4
    )
    write_rows(tmp_path / "my pairs.jsonl", rows)
    again = run_again(tmp_path / "cache", "pairs/train", tmp_path / "again", monkeypatch)
    assert len(again) == 4 and content(again) == content(pairs_of(tmp_path / "cache", "pairs"))


def test_what_was_imported(
    source: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_pairs(source / "cache", "chat", tmp_path / "chat.parquet", log=lambda _: None)
    options = {"reference": "a friend's", "name": "mine", "model": model_folder, "dtype": "float32"}
    import_pairs(tmp_path / "cache", tmp_path / "chat.parquet", log=lambda _: None, **options)
    again = run_again(tmp_path / "cache", "mine/train", tmp_path / "again", monkeypatch)
    before = pairs_of(tmp_path / "cache", "mine")
    assert again.reference_id == before.reference_id
    assert content(again, token_logps=False) == content(before, token_logps=False)
