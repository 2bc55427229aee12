import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dpo_cache.errors import (
    CorruptShardError,
    DpoCacheError,
    FormatError,
    NotInCacheError,
    OptionError,
    StorageError,
)
from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.format.documents import digest_json
from dpo_cache.types import Completion, Score, ScoredPair
from tests.store.conftest import flip, make_pairs, plain

IDENTITY = {"scoring": 1, "weights": "a" * 64, "config": {"hidden_size": 32}, "dtype": "float32"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path / "cache", create=True)


def write_pairs(cache: Cache, name: str, split: str, pairs: list[ScoredPair]) -> None:
    writer = cache.write_pairs(name, split)
    writer.add(pairs)
    writer.finish({"name": name, "split": split, "reference": "0" * 64})


def write_format(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "format.json").write_text(json.dumps(content))
    return folder


# -- opening -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"), [("none", "no such folder"), ("folder", "no format.json"), ("file", "it is a file")]
)
def test_what_is_no_cache(tmp_path: Path, kind: str, reason: str) -> None:
    if kind == "folder":
        (tmp_path / kind).mkdir()
    elif kind == "file":
        (tmp_path / kind).touch()
    with pytest.raises(FormatError, match=f"{kind}: no dpo-cache here .{reason}."):
        open_cache(tmp_path / kind)


def test_a_missing_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        open_cache(tmp_path / "cache")
    assert str(caught.value) == (
        f"{tmp_path}/cache: no dpo-cache here (no such folder).\n"
        f"Check the path, or run `dpo-cache precompute --cache {tmp_path}/cache …` to make one."
    )
    assert not (tmp_path / "cache").exists()


def test_a_new_cache_is_written_when_something_is_published(cache: Cache) -> None:
    root = Path(str(cache))
    assert not root.exists()
    cache.publish_reference(IDENTITY, {})
    assert (root / "format.json").read_text() == '{\n  "format": "dpo-cache",\n  "version": 1\n}\n'
    assert open_cache(root).references() == cache.references()


def test_an_empty_folder_may_become_a_cache(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("")
    write_pairs(open_cache(tmp_path, create=True), "dialogues", "train", make_pairs(2))
    assert open_cache(tmp_path).pair_sets() == ["dialogues/train"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.tex", "b", "c", "d", "e", "f"):
        (tmp_path / name).write_text("")
    with pytest.raises(FormatError) as caught:
        open_cache(tmp_path, create=True)
    assert str(caught.value) == (
        f"{tmp_path}: the folder holds other things (b, c, d, e, f) and no format.json.\n"
        "Choose an empty or new folder for `cache`."
    )


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="no dpo-cache here"):
        open_cache(tmp_path / "file")
    with pytest.raises(StorageError, match="Something in this path is a file: choose another `cache`"):
        open_cache(tmp_path / "file", create=True)


@pytest.mark.parametrize("create", [False, True])
def test_a_path_with_too_long_a_name_is_an_error_of_ours(tmp_path: Path, create: bool) -> None:
    with pytest.raises(DpoCacheError):
        open_cache(tmp_path / ("x" * 300), create=create)


@pytest.mark.parametrize("create", [False, True])
def test_a_newer_format_says_to_upgrade(tmp_path: Path, create: bool) -> None:
    write_format(tmp_path / "cache", {"format": "dpo-cache", "version": 2, "more": []})
    with pytest.raises(FormatError) as caught:
        open_cache(tmp_path / "cache", create=create)
    assert str(caught.value) == (
        f"{tmp_path}/cache: made by a newer dpo-cache (cache format 2, this one reads 1).\n"
        "Run `pip install --upgrade dpo-cache`, or choose another `cache`."
    )


@pytest.mark.parametrize(
    "content",
    [{}, {"format": "zarr", "version": 1}, {"format": "dpo-cache"}, {"format": "dpo-cache", "version": "2"}],
)
def test_a_format_that_is_not_ours_is_refused(tmp_path: Path, content: dict) -> None:
    with pytest.raises(FormatError) as caught:
        open_cache(write_format(tmp_path / "cache", content))
    assert (
        str(caught.value)
        == f"{tmp_path}/cache/format.json: expected {{'format': 'dpo-cache', 'version': 1}}, found {content}."
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_format_file_that_is_no_document_is_corrupt(tmp_path: Path, content: str) -> None:
    (tmp_path / "format.json").write_text(content)
    with pytest.raises(CorruptShardError, match=f"^{re.escape(str(tmp_path))}/format.json: "):
        open_cache(tmp_path)


# -- references --------------------------------------------------------------------------------------------


def test_a_reference_is_read_back_by_its_id(cache: Cache) -> None:
    reference_id = cache.publish_reference(IDENTITY, {"model": "example/tiny"})
    assert cache.references() == [reference_id]
    assert cache.read_reference(reference_id) == {
        "identity": IDENTITY,
        "provenance": {"model": "example/tiny"},
    }


def test_a_reference_that_is_known_keeps_its_first_provenance(cache: Cache) -> None:
    first = cache.publish_reference(IDENTITY, {"model": "example/tiny"})
    assert cache.publish_reference(dict(reversed(IDENTITY.items())), {"model": "example/renamed"}) == first
    assert cache.read_reference(first)["provenance"] == {"model": "example/tiny"}


def test_other_weights_are_another_reference(cache: Cache) -> None:
    ids = {cache.publish_reference({**IDENTITY, "weights": letter * 64}, {}) for letter in "ab"}
    assert len(ids) == 2
    assert cache.references() == sorted(ids)


def test_an_unknown_reference_says_what_to_run(cache: Cache) -> None:
    with pytest.raises(NotInCacheError) as caught:
        cache.read_reference("0" * 64)
    assert str(caught.value) == f"{cache}: no reference {'0' * 64}.\nRun `dpo-cache precompute` to score it."
    assert len(cache.scores("0" * 64)) == 0


def test_every_flipped_byte_of_a_reference_is_found(cache: Cache) -> None:
    reference_id = cache.publish_reference(IDENTITY, {"model": "example/tiny"})
    file = Path(str(cache)) / f"references/{reference_id}/reference.json"
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(flip(content, position))
        with pytest.raises(CorruptShardError, match=f"^{re.escape(str(file))}: "):
            cache.read_reference(reference_id)


def test_a_reference_under_the_id_of_another_is_found(cache: Cache) -> None:
    one, two = (cache.publish_reference({**IDENTITY, "weights": letter * 64}, {}) for letter in "ab")
    root = Path(str(cache)) / "references"
    shutil.copy(root / one / "reference.json", root / two / "reference.json")
    with pytest.raises(CorruptShardError, match=f"{two}/reference.json: its identity does not hash to {two}"):
        cache.read_reference(two)


def test_a_reference_is_found_by_the_start_of_its_id(cache: Cache) -> None:
    ids = [cache.publish_reference({**IDENTITY, "scoring": number}, {}) for number in range(5)]
    for reference_id in ids:
        assert cache.find_reference(reference_id) == cache.find_reference(reference_id[:20]) == reference_id


def test_a_start_that_fits_two_references_is_refused(cache: Cache) -> None:
    ids = sorted(cache.publish_reference({**IDENTITY, "scoring": number}, {}) for number in range(17))
    letter, count = Counter(reference_id[0] for reference_id in ids).most_common(1)[0]
    with pytest.raises(NotInCacheError) as caught:
        cache.find_reference(letter)
    shown = ", ".join(reference_id[:12] for reference_id in ids)
    assert (
        str(caught.value)
        == f"{cache}: {count} references whose id starts with {letter!r}.\nKnown references: {shown}."
    )


def test_a_start_that_fits_no_reference_is_refused(cache: Cache) -> None:
    with pytest.raises(NotInCacheError) as caught:
        cache.find_reference("beef")
    assert str(caught.value) == f"{cache}: no reference whose id starts with 'beef'.\nKnown references: none."


# -- pair sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "-x", "..", "a b", "a\n", "ä", "x" * 129, "a\\b"])
def test_a_name_that_cannot_stand_in_a_path_is_refused(cache: Cache, name: str) -> None:
    for place in ((name, "train"), ("dialogues", name)):
        with pytest.raises(OptionError) as caught:
            cache.write_pairs(*place)
        assert str(caught.value) == (
            f"{name!r} cannot name a pair set: use letters, digits, '.', '_' and '-', at most 128, not "
            "starting with '.' or '-'."
        )
    assert not Path(str(cache)).exists()


@pytest.mark.parametrize("name", ["a", "_a", "7", "ultra-feedback_v1.2", "x" * 128])
def test_plain_names_are_taken(cache: Cache, name: str) -> None:
    write_pairs(cache, name, name, make_pairs(1))
    assert cache.pair_sets() == [f"{name}/{name}"]


def test_a_name_alone_means_train(cache: Cache) -> None:
    for first_row, split in enumerate(("dev", "train", "test")):
        write_pairs(cache, "dialogues", split, make_pairs(2, first_row))
    assert cache.pairs("dialogues").name == "dialogues/train"
    assert cache.pairs("dialogues/test").name == "dialogues/test"


def test_a_name_alone_means_the_only_split(cache: Cache) -> None:
    write_pairs(cache, "dialogues", "test", make_pairs(2))
    write_pairs(cache, "dialogues2", "dev", make_pairs(2))
    assert cache.pairs("dialogues").name == "dialogues/test"


def test_a_name_with_several_splits_and_no_train_is_refused(cache: Cache) -> None:
    for split in ("test", "dev"):
        write_pairs(cache, "dialogues", split, make_pairs(2))
    with pytest.raises(NotInCacheError) as caught:
        cache.pairs("dialogues")
    assert (
        str(caught.value)
        == f"{cache}: 'dialogues' has several splits.\nIt holds: dialogues/dev, dialogues/test."
    )


def test_an_unknown_pair_set_shows_those_there_are(cache: Cache) -> None:
    with pytest.raises(NotInCacheError) as caught:
        cache.pairs("dialogues")
    assert str(caught.value) == f"{cache}: no pair set 'dialogues'.\nIt holds: no pair sets."
    write_pairs(cache, "dialogues", "train", make_pairs(2))
    with pytest.raises(NotInCacheError) as caught:
        cache.pairs("dialogue")
    assert str(caught.value) == f"{cache}: no pair set 'dialogue'.\nIt holds: dialogues/train."


def test_two_openers_of_a_new_cache_may_both_write(tmp_path: Path) -> None:
    one, two = open_cache(tmp_path / "cache", create=True), open_cache(tmp_path / "cache", create=True)
    write_pairs(one, "one", "train", make_pairs(2))
    write_pairs(two, "two", "train", make_pairs(3, first_row=5))
    assert open_cache(tmp_path / "cache").pair_sets() == ["one/train", "two/train"]
    assert [plain(scored) for scored in one.pairs("two")] == [
        plain(scored) for scored in make_pairs(3, first_row=5)
    ]


# -- other readers -----------------------------------------------------------------------------------------


def fill(cache: Cache) -> tuple[list[ScoredPair], dict[bytes, Score], str]:
    """A cache of 12 pairs and their scores; and the folder of the scores."""
    pairs = make_pairs(12)
    by_key = {}
    for scored in pairs:
        by_key[completion_key(scored.pair.chosen)] = scored.ref_chosen
        by_key[completion_key(scored.pair.rejected)] = scored.ref_rejected
    reference_id = cache.publish_reference(IDENTITY, {})
    cache.scores(reference_id).publish(list(by_key.items()))
    write_pairs(cache, "dialogues", "train", pairs)
    return pairs, by_key, f"{cache}/references/{reference_id}/scores"


def pair_row(scored: ScoredPair) -> dict:
    """A row of the pair set's Parquet, written from the pair."""

    def side(name: str, completion: Completion, score: Score) -> dict:
        return {
            f"{name}_ids": completion.completion_ids.tolist(),
            f"{name}_key": completion_key(completion),
            f"{name}_num_tokens": completion.num_tokens,
            f"ref_{name}_logps": score.logps,
            f"ref_{name}_token_logps": score.token_logps.tolist(),
        }

    prompt, own = scored.pair.chosen.prompt_ids.tolist(), scored.pair.rejected.prompt_ids.tolist()
    return {
        "row": scored.pair.row,
        "prompt_ids": prompt,
        "rejected_prompt_ids": None if own == prompt else own,
        **side("chosen", scored.pair.chosen, scored.ref_chosen),
        **side("rejected", scored.pair.rejected, scored.ref_rejected),
    }


def score_rows(by_key: dict[bytes, Score]) -> list[dict]:
    return [
        {
            "key": key,
            "num_tokens": len(score.token_logps),
            "logps": score.logps,
            "token_logps": score.token_logps.tolist(),
        }
        for key, score in sorted(by_key.items())
    ]


def test_duckdb_alone_reads_the_same_numbers(cache: Cache) -> None:
    duckdb = pytest.importorskip("duckdb")
    pairs, by_key, scores = fill(cache)

    def rows(query: str) -> list[dict]:
        with duckdb.connect() as connection:
            result = connection.execute(query)
            names = [column[0] for column in result.description]
            return [dict(zip(names, values, strict=True)) for values in result.fetchall()]

    assert rows(f"select * from '{cache}/pairs/dialogues/train/*.parquet' order by row") == [
        pair_row(scored) for scored in pairs
    ]
    assert rows(f"select * from '{scores}/*.parquet' order by key") == score_rows(by_key)


def test_the_datasets_library_alone_reads_the_same_numbers(cache: Cache, tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs, by_key, scores = fill(cache)

    def rows(pattern: str) -> list[dict]:
        return load_dataset(
            "parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "hf")
        ).to_list()

    assert rows(f"{cache}/pairs/dialogues/train/*.parquet") == [pair_row(scored) for scored in pairs]
    assert sorted(rows(f"{scores}/*.parquet"), key=lambda row: row["key"]) == score_rows(by_key)


def test_a_cache_that_another_writer_makes_at_the_same_moment_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_just_after(self: LocalFolder, name: str) -> bool:
        monkeypatch.undo()
        open_cache(tmp_path / "cache", create=True).publish_reference({"weights": "w"}, {})
        return False

    monkeypatch.setattr(LocalFolder, "exists", made_just_after)
    assert open_cache(tmp_path / "cache", create=True).references() == [digest_json({"weights": "w"})]
