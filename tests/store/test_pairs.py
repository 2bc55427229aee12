import hashlib
import os
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dpo_cache.errors import CorruptShardError, NotInCacheError, StorageError
from dpo_cache.store import Cache, PairSet, completion_key, open_cache
from dpo_cache.store import pairs as pairs_module
from dpo_cache.store import parts as parts_module
from dpo_cache.store.format.documents import seal_document
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, PairsDigest
from dpo_cache.types import ScoredPair
from tests.store.conftest import flip, flip_file, make_pairs, plain

DETAILS = {"name": "dialogues", "split": "train", "reference": "0" * 64, "pairs_digest": "1" * 64}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path / "cache", create=True)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 7 pairs, read in blocks of 3."""
    monkeypatch.setattr(pairs_module, "PART_PAIRS", 7)
    monkeypatch.setattr(pairs_module, "ROW_GROUP_PAIRS", 3)


def write(cache: Cache, pairs: list[ScoredPair]) -> dict[str, Any]:
    writer = cache.write_pairs("dialogues", "train")
    writer.add(pairs)
    return writer.finish(DETAILS)


def place_of(cache: Cache) -> Path:
    return Path(str(cache)) / "pairs/dialogues/train"


def reseal(cache: Cache, changes: dict[str, Any]) -> None:
    """Publish a manifest with other members, sealed correctly."""
    manifest = {**cache.pairs("dialogues").manifest, **changes}
    (place_of(cache) / "manifest.json").write_bytes(seal_document(manifest))


def read(pair_set: PairSet) -> list[dict[str, Any]]:
    return [plain(scored) for scored in pair_set]


@pytest.mark.parametrize("location", ["local", "memory"])
def test_what_is_written_is_read_back(tmp_path: Path, location: str) -> None:
    cache = open_cache(
        tmp_path / "cache" if location == "local" else f"memory://{tmp_path.name}-pairs", create=True
    )
    pairs = make_pairs(20)
    write(cache, pairs)
    pair_set = open_cache(str(cache)).pairs("dialogues/train")
    assert read(pair_set) == [plain(scored) for scored in pairs]
    assert len(pair_set) == 20
    assert pair_set.block_sizes == [20]
    assert (pair_set.name, pair_set.reference_id) == ("dialogues/train", "0" * 64)
    assert pair_set.is_complete()


def test_a_rejected_prompt_is_stored_only_where_it_differs(cache: Cache) -> None:
    pairs = make_pairs(9)
    write(cache, pairs)
    (part,) = place_of(cache).glob("*.parquet")
    stored = pq.read_table(part).column("rejected_prompt_ids").to_pylist()
    assert stored == [
        scored.pair.rejected.prompt_ids.tolist() if scored.pair.row % 3 == 0 else None for scored in pairs
    ]


def test_the_columns_that_others_read_follow_from_the_pairs(cache: Cache) -> None:
    pairs = make_pairs(5)
    write(cache, pairs)
    (part,) = place_of(cache).glob("*.parquet")
    table = pq.read_table(part)
    assert table.schema.names == PAIR_SCHEMA.names
    for side in ("chosen", "rejected"):
        completions = [getattr(scored.pair, side) for scored in pairs]
        scores = [getattr(scored, f"ref_{side}") for scored in pairs]
        assert table.column(f"{side}_key").to_pylist() == [
            completion_key(completion) for completion in completions
        ]
        assert table.column(f"{side}_num_tokens").to_pylist() == [
            completion.num_tokens for completion in completions
        ]
        assert table.column(f"ref_{side}_logps").to_pylist() == [score.logps for score in scores]


@pytest.mark.parametrize("num_pairs", [1, 3, 6, 7, 8, 14, 23])
def test_pair_sets_of_any_size_are_read_back(cache: Cache, small_parts: None, num_pairs: int) -> None:
    pairs = make_pairs(num_pairs)
    manifest = write(cache, pairs)
    pair_set = cache.pairs("dialogues")
    assert [part["rows"] for part in manifest["parts"]] == [7] * (num_pairs // 7) + [num_pairs % 7] * (
        num_pairs % 7 > 0
    )
    assert read(pair_set) == [plain(scored) for scored in pairs]
    assert sum(pair_set.block_sizes) == len(pair_set) == num_pairs
    assert max(pair_set.block_sizes) <= 3


def test_adding_in_pieces_gives_the_same_manifest(cache: Cache, small_parts: None, tmp_path: Path) -> None:
    pairs = make_pairs(23)
    other = open_cache(tmp_path / "other", create=True)
    writer = other.write_pairs("dialogues", "train")
    for start in range(0, 23, 5):
        writer.add(pairs[start : start + 5])
    assert writer.finish(DETAILS) == write(cache, pairs)
    assert sorted(path.name for path in place_of(other).iterdir()) == sorted(
        path.name for path in place_of(cache).iterdir()
    )


def test_blocks_read_in_any_order_hold_what_iteration_gives(cache: Cache, small_parts: None) -> None:
    write(cache, make_pairs(23))
    in_order = read(cache.pairs("dialogues"))
    pair_set = cache.pairs("dialogues")
    assert pair_set.block_sizes == [3, 3, 1] * 3 + [2]
    order = list(range(len(pair_set.block_sizes)))
    random.Random(0).shuffle(order)
    blocks = {block: [plain(scored) for scored in pair_set.read_block(block)] for block in order + order}
    assert [scored for block in sorted(blocks) for scored in blocks[block]] == in_order


def test_an_empty_pair_set_is_read_back_empty(cache: Cache) -> None:
    assert write(cache, [])["num_pairs"] == 0
    assert read(cache.pairs("dialogues")) == []


def test_nothing_is_visible_before_finish(cache: Cache, small_parts: None) -> None:
    writer = cache.write_pairs("dialogues", "train")
    writer.add(make_pairs(20))
    assert len(list(place_of(cache).glob("*.parquet"))) == 2
    assert cache.pair_sets() == []
    with pytest.raises(NotInCacheError):
        cache.pairs("dialogues")
    writer.finish(DETAILS)
    assert cache.pair_sets() == ["dialogues/train"]


def test_an_unfinished_replacement_leaves_the_old_rows(cache: Cache, small_parts: None) -> None:
    old, new = make_pairs(9), make_pairs(20, first_row=100)
    write(cache, old)
    writer = cache.write_pairs("dialogues", "train")
    writer.add(new)
    assert read(cache.pairs("dialogues")) == [plain(scored) for scored in old]
    writer.finish(DETAILS)
    assert read(cache.pairs("dialogues")) == [plain(scored) for scored in new]


def test_a_reader_keeps_the_rows_it_was_opened_on(cache: Cache, small_parts: None) -> None:
    old, new = make_pairs(10), make_pairs(12, first_row=100)
    write(cache, old)
    early = cache.pairs("dialogues")
    stream = iter(early)
    first = plain(next(stream))
    write(cache, new)
    assert [first, *map(plain, stream)] == read(early) == [plain(scored) for scored in old]
    assert read(cache.pairs("dialogues")) == [plain(scored) for scored in new]


def test_bytes_written_are_those_of_the_new_files(cache: Cache, small_parts: None) -> None:
    writer = cache.write_pairs("dialogues", "train")
    writer.add(make_pairs(10))
    writer.finish(DETAILS)
    assert writer.bytes_written == sum(path.stat().st_size for path in place_of(cache).iterdir())
    again = cache.write_pairs("dialogues", "train")
    again.add(make_pairs(10))
    again.finish(DETAILS)
    assert again.bytes_written == (place_of(cache) / "manifest.json").stat().st_size


def test_flipped_bytes_of_a_part_are_found_and_the_file_is_named(cache: Cache, small_parts: None) -> None:
    write(cache, make_pairs(10))
    part = place_of(cache) / cache.pairs("dialogues").manifest["parts"][1]["file"]
    content = part.read_bytes()
    for position in [*range(64), *range(64, len(content) - 64, 61), *range(len(content) - 64, len(content))]:
        part.write_bytes(flip(content, position))
        with pytest.raises(
            CorruptShardError, match=f"^{re.escape(str(part))}: its bytes hash to .* not to its name"
        ):
            list(cache.pairs("dialogues"))


def test_pairs_before_a_damaged_part_are_still_read(cache: Cache, small_parts: None) -> None:
    write(cache, make_pairs(10))
    flip_file(place_of(cache) / cache.pairs("dialogues").manifest["parts"][1]["file"], 200)
    pair_set = cache.pairs("dialogues")
    assert [len(pair_set.read_block(block)) for block in range(3)] == [3, 3, 1]
    with pytest.raises(CorruptShardError):
        pair_set.read_block(3)


def test_damage_after_the_first_block_is_found_by_the_page_checksums(cache: Cache, small_parts: None) -> None:
    write(cache, make_pairs(7))
    pair_set = cache.pairs("dialogues")
    pair_set.read_block(0)
    (part,) = place_of(cache).glob("*.parquet")
    column = pq.read_metadata(part).row_group(1).column(PAIR_SCHEMA.names.index("chosen_key"))
    flip_file(part, column.data_page_offset + column.total_compressed_size - 1)
    with pytest.raises(CorruptShardError, match=rf"^{re.escape(str(part))}: row group 1 is not readable \("):
        pair_set.read_block(1)


def test_every_flipped_byte_of_the_manifest_is_found(cache: Cache) -> None:
    write(cache, make_pairs(3))
    manifest = place_of(cache) / "manifest.json"
    content = manifest.read_bytes()
    for position in range(len(content)):
        manifest.write_bytes(flip(content, position))
        with pytest.raises(CorruptShardError, match=f"^{re.escape(str(manifest))}: "):
            cache.pairs("dialogues")


def test_a_manifest_that_promises_other_than_its_parts_is_refused(cache: Cache) -> None:
    write(cache, make_pairs(3))
    reseal(cache, {"num_pairs": 4})
    with pytest.raises(CorruptShardError) as caught:
        cache.pairs("dialogues")
    assert str(caught.value) == f"{place_of(cache)}/manifest.json: 4 pairs promised, 3 in its parts."


@pytest.mark.parametrize("rows", [(8, 2), (6, 4), (5, 5), (9, 1)])
def test_a_manifest_with_wrong_rows_in_its_parts_is_refused(
    cache: Cache, small_parts: None, rows: tuple[int, int]
) -> None:
    manifest = write(cache, make_pairs(10))
    parts = [{**part, "rows": count} for part, count in zip(manifest["parts"], rows, strict=True)]
    reseal(cache, {"parts": parts})
    with pytest.raises(CorruptShardError, match=f"^{re.escape(str(place_of(cache)))}/[0-9a-f]*.parquet: "):
        list(cache.pairs("dialogues"))


def test_a_manifest_that_leaves_whole_row_groups_out_is_refused(cache: Cache, small_parts: None) -> None:
    manifest = write(cache, make_pairs(7))
    reseal(cache, {"num_pairs": 3, "parts": [{**manifest["parts"][0], "rows": 3}]})
    with pytest.raises(CorruptShardError):
        list(cache.pairs("dialogues"))


def test_a_part_that_is_gone_is_a_storage_error_and_shows(cache: Cache, small_parts: None) -> None:
    write(cache, make_pairs(10))
    pair_set = cache.pairs("dialogues")
    part = place_of(cache) / pair_set.manifest["parts"][1]["file"]
    part.unlink()
    assert not pair_set.is_complete()
    with pytest.raises(StorageError, match=f"^cannot read {re.escape(str(part))}: "):
        list(pair_set)


def test_the_digest_of_pairs_follows_rows_keys_and_their_order() -> None:
    def digest(*pairs: tuple[int, bytes, bytes]) -> str:
        running = PairsDigest()
        for pair in pairs:
            running.add(*pair)
        return running.hexdigest()

    one, two = (3, b"a" * 16, b"b" * 16), (4, b"c" * 16, b"d" * 16)
    plainly = hashlib.sha256(b"dpo-cache pairs/1" + struct.pack("<q", 3) + b"a" * 16 + b"b" * 16).hexdigest()
    assert digest(one) == plainly
    assert (
        len(
            {
                digest(one),
                digest(one, two),
                digest(two, one),
                digest((3, one[2], one[1])),
                digest((5, *one[1:])),
                digest(),
            }
        )
        == 6
    )


@pytest.fixture
def read_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are read, in order."""
    blocks: list[int] = []
    read_block = PairSet.read_block
    monkeypatch.setattr(
        PairSet, "read_block", lambda self, block: blocks.append(block) or read_block(self, block)
    )
    return blocks


def test_indices_and_slices_give_what_a_list_gives(cache: Cache, small_parts: None) -> None:
    pairs = make_pairs(23)
    write(cache, pairs)
    pair_set, expected = cache.pairs("dialogues"), [plain(scored) for scored in pairs]
    for index in range(-23, 23):
        assert plain(pair_set[index]) == expected[index]
    ends = (None, -30, -23, -4, 0, 3, 7, 22, 30)
    for start in ends:
        for stop in ends:
            for step in (None, 1, 2, 5, -1, -3):
                found = [plain(scored) for scored in pair_set[start:stop:step]]
                assert found == expected[start:stop:step], (start, stop, step)
    assert plain(pair_set[np.int64(5)]) == expected[5]


@pytest.mark.parametrize("index", [23, -24, 10**9])
def test_an_index_beyond_the_pairs_is_an_index_error(cache: Cache, index: int) -> None:
    write(cache, make_pairs(23))
    with pytest.raises(IndexError, match=rf"^pair {index} of dialogues/train, which has 23 pairs$"):
        cache.pairs("dialogues")[index]


def test_what_is_no_index_is_a_type_error(cache: Cache) -> None:
    write(cache, make_pairs(3))
    with pytest.raises(TypeError):
        cache.pairs("dialogues")["0"]  # type: ignore[call-overload]


def test_indexing_reads_only_the_blocks_it_needs_and_keeps_the_last(
    cache: Cache, small_parts: None, read_blocks: list[int]
) -> None:
    write(cache, make_pairs(23))  # blocks of 3, 3, 1, 3, 3, 1, 3, 3, 1 and 2 pairs
    pair_set = cache.pairs("dialogues")
    assert len(pair_set[4:8]) == 4 and read_blocks == [1, 2, 3]
    assert pair_set[9].pair.row == pair_set[8].pair.row + 1 and read_blocks == [1, 2, 3]
    assert pair_set[-1].pair.row and read_blocks == [1, 2, 3, 9]
    assert pair_set[5:5] == [] and read_blocks == [1, 2, 3, 9]
    pair_set[::-1]
    assert read_blocks[4:] == [8, 7, 6, 5, 4, 3, 2, 1, 0]  # the last block was kept


def test_a_torch_data_loader_takes_it_as_a_data_set(cache: Cache) -> None:
    write(cache, make_pairs(9))
    loader = torch.utils.data.DataLoader(cache.pairs("dialogues"), batch_size=4, collate_fn=list)
    assert [len(batch) for batch in loader] == [4, 4, 1]


def test_reprs_are_one_line_with_counts(cache: Cache) -> None:
    write(cache, make_pairs(3))
    pair_set = cache.pairs("dialogues")
    assert repr(pair_set) == "<PairSet dialogues/train: 3 pairs, reference 000000000000>"
    assert repr(cache) == f"<Cache {cache}>"


# -- other processes that remove parts -----------------------------------------------------------------------


def remove_parts_at(monkeypatch: pytest.MonkeyPatch, cache: Cache, moments: int) -> None:
    """All parts are removed each time that a manifest was published, or parts after it, so many times."""
    left, real = [moments], cache.folder.publish

    def publish(name: str, content: bytes) -> None:
        real(name, content)
        if left[0] and (name.endswith("manifest.json") or (place_of(cache) / "manifest.json").exists()):
            left[0] -= 1
            for part in place_of(cache).glob("*.parquet"):
                part.unlink()

    monkeypatch.setattr(cache.folder, "publish", publish)


@pytest.mark.parametrize("kept_bytes", [0, 2**20], ids=["in a file", "in memory"])
@pytest.mark.parametrize("moments", [1, 3])
def test_parts_that_others_remove_are_published_again(
    cache: Cache, small_parts: None, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, moments: int
) -> None:
    monkeypatch.setattr(parts_module, "KEPT_BYTES", kept_bytes)
    remove_parts_at(monkeypatch, cache, moments)
    pairs = make_pairs(20)
    write(cache, pairs)
    assert read(cache.pairs("dialogues")) == [plain(scored) for scored in pairs]


def test_a_pair_set_whose_parts_are_lost_is_not_left_half(
    cache: Cache, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "KEPT_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")  # so nothing is kept
    remove_parts_at(monkeypatch, cache, 1)
    with pytest.raises(StorageError, match="other processes removed parts while the pair set was written"):
        write(cache, make_pairs(20))
    assert cache.pair_sets() == []


def test_a_pair_set_that_others_removed_meanwhile_stays_removed(
    cache: Cache, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache.folder.publish

    def publish(name: str, content: bytes) -> None:
        real(name, content)
        if name.endswith("manifest.json"):
            for path in place_of(cache).iterdir():
                path.unlink()

    monkeypatch.setattr(cache.folder, "publish", publish)
    write(cache, make_pairs(20))
    assert cache.pair_sets() == [] and not any(place_of(cache).iterdir())


@pytest.mark.parametrize("spoil", ["cut", "flipped", "pipe"])
def test_a_leftover_that_is_not_whole_is_written_again(cache: Cache, small_parts: None, spoil: str) -> None:
    pairs = make_pairs(10)
    write(cache, pairs)
    part = place_of(cache) / cache.pairs("dialogues").manifest["parts"][0]["file"]
    if spoil == "flipped":
        flip_file(part, 200)
    else:
        content = part.read_bytes()
        part.unlink()
        os.mkfifo(part) if spoil == "pipe" else part.write_bytes(content[:-9])
    assert not cache.pairs("dialogues").is_complete()
    write(cache, pairs)
    assert cache.pairs("dialogues").is_complete()
    assert read(cache.pairs("dialogues")) == [plain(scored) for scored in pairs]
