"""`verify` names each damaged file, and no others."""

from pathlib import Path

import fsspec
import pytest

import dpo_cache
from dpo_cache.errors import CorruptShardError, FormatError, NewerFormatError
from dpo_cache.exchange import export_pairs
from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.format.documents import digest_json, open_sealed, seal_document
from dpo_cache.store.format.parquet import name_by_content
from dpo_cache.store.format.shards import encode_shard
from dpo_cache.store.upkeep import key_ranges
from dpo_cache.store.upkeep.contents import read_contents
from dpo_cache.store.upkeep.merge import merge_caches
from dpo_cache.store.upkeep.repair import repair_cache
from dpo_cache.store.upkeep.verify import VerifyReport, verify_cache
from tests.store.caches import (
    add_pairs,
    add_reference,
    add_scores,
    completion,
    contents,
    key_of,
    make_cache,
    value,
)
from tests.store.conftest import flip_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("scores/*.parquet"))


def the_manifest(root: Path) -> Path:
    return root / "pairs/demo/train/manifest.json"


def files_of(report: VerifyReport) -> dict[str, str]:
    return {problem.file: problem.kind for problem in report.problems}


def test_a_whole_cache_is_counted_and_has_no_problem(root: Path) -> None:
    report = verify_cache(root)
    assert report.is_whole and (report.unreferenced, report.unknown) == ([], [])
    assert (report.files, report.references, report.completions, report.pair_sets, report.pairs) == (
        6,
        1,
        5,
        1,
        2,
    )
    assert report.bytes == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_progress_ends_at_every_byte(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_cache(root, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (report.bytes, report.bytes)


def test_a_missing_part_is_named_with_what_the_manifest_says(root: Path) -> None:
    (part,) = (root / "pairs/demo/train").glob("*.parquet")
    part.unlink()
    (problem,) = verify_cache(root).problems
    assert (problem.file, problem.kind) == (f"pairs/demo/train/{part.name}", "missing")
    assert problem.expected.startswith("2 pairs, ") and problem.remedy.startswith(
        "Run the `dpo-cache precompute` that made it"
    )


def test_a_missing_reference_entry_is_named_once(root: Path) -> None:
    (entry,) = root.glob("references/*/reference.json")
    entry.unlink()
    assert {problem.file for problem in verify_cache(root).problems} == {entry.relative_to(root).as_posix()}


def test_a_missing_format_is_written_again(root: Path) -> None:
    before = (root / "format.json").read_bytes()
    (root / "format.json").unlink()
    report = verify_cache(root)
    assert files_of(report) == {"format.json": "missing"}
    repair_cache(root, report)
    assert (root / "format.json").read_bytes() == before and verify_cache(root).is_whole


def test_a_newer_format_is_no_damage_and_is_not_touched(root: Path) -> None:
    (root / "format.json").write_text('{\n  "format": "dpo-cache",\n  "version": 2\n}\n')
    with pytest.raises(NewerFormatError, match="cache format 2, this one reads 1"):
        verify_cache(root)


def test_a_folder_that_is_no_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no dpo-cache here"):
        verify_cache(tmp_path)


def test_a_file_of_another_name_is_found_though_its_bytes_are_whole(root: Path) -> None:
    shard = shards(root)[0]
    other = shard.with_name("0" * 64 + ".parquet")
    shard.rename(other)
    assert files_of(verify_cache(root)) == {other.relative_to(root).as_posix(): "damaged"}


def write_shard(root: Path, scores: list) -> str:
    """A shard of valid bytes, whatever its values."""
    content = encode_shard(scores)
    path = next(root.glob("references/*/scores")) / name_by_content(content)
    path.write_bytes(content)
    return path.relative_to(root).as_posix()


def test_a_completion_that_stands_twice_in_a_shard_is_damage(root: Path) -> None:
    name = write_shard(root, [(key_of(9), value(9)), (key_of(9), value(9))])
    assert files_of(verify_cache(root)) == {name: "damaged"}


def test_shards_that_disagree_are_both_named(root: Path) -> None:
    name = write_shard(root, [(key_of(4), value(4, 0.5))])
    (problem,) = verify_cache(root).problems
    named = {problem.file, problem.other}
    assert problem.kind == "differs" and name in named and len(named) == 2
    assert (
        "a gap of up to 0.5 nats in 1 of them" in problem.found
        and "within 0.001 nats a token" in problem.expected
    )


@pytest.mark.parametrize("ranges", [1, 7])
def test_a_gap_within_rounding_is_none_a_larger_one_is_found_in_any_range(
    root: Path, monkeypatch: pytest.MonkeyPatch, ranges: int
) -> None:
    monkeypatch.setattr(key_ranges, "RANGE_BYTES", 6000 // ranges)
    reference = next(root.glob("references/*")).name
    cache = Cache(root)
    add_scores(cache, reference, range(10, 30))
    add_scores(cache, reference, range(10, 30), shift=5e-4)
    assert verify_cache(root).is_whole
    add_scores(cache, reference, [17, 18], shift=0.25)
    report = verify_cache(root)
    assert {problem.kind for problem in report.problems} == {"differs"}
    assert sum(
        int(problem.found.split(" in ")[1].split()[0])
        for problem in report.problems
        if "0.25" in problem.found
    ) in (2, 4)  # compared with one other file or with both


def test_bfloat16_allows_what_float32_does_not(tmp_path: Path) -> None:
    for dtype, whole in (("float32", False), ("bfloat16", True)):
        cache = open_cache(tmp_path / dtype, create=True)
        reference = add_reference(cache, dtype=dtype)
        add_scores(cache, reference, [1, 2])
        add_scores(cache, reference, [1, 2], shift=0.1)
        assert verify_cache(tmp_path / dtype).is_whole is whole


def test_a_pair_set_whose_values_are_not_the_scores_is_named(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", pairs=())
    add_pairs(cache, cache.references()[0], [(0, 1), (2, 3)], shift=0.75)
    problems = verify_cache(tmp_path / "cache").problems
    assert {problem.file for problem in problems} == {"pairs/demo/train/manifest.json"}
    assert {problem.kind for problem in problems} == {"differs"} and all(
        "/scores/" in str(problem.other) for problem in problems
    )


def test_a_pair_set_without_its_scores_is_whole(root: Path) -> None:
    for shard in shards(root):
        shard.unlink()
    assert verify_cache(root).is_whole


def reseal(path: Path, **changes: object) -> None:
    path.write_bytes(seal_document({**open_sealed(path.read_bytes(), str(path)), **changes}))


def test_a_manifest_that_is_sealed_but_wrong_is_found(root: Path) -> None:
    reseal(the_manifest(root), pairs_digest="0" * 64)
    assert files_of(verify_cache(root)) == {"pairs/demo/train/manifest.json": "damaged"}


def test_a_manifest_in_another_place_is_found(root: Path) -> None:
    (root / "pairs/demo").rename(root / "pairs/other")
    assert files_of(verify_cache(root)) == {"pairs/other/train/manifest.json": "damaged"}


WRONG_DETAILS = [
    {"source": []},
    {"source": {}},
    {"tokenization": "x"},
    {"tokenization": {"max_length": "long"}},
    {"pairs_digest": 7},
    {"token_logps": 1},
]


@pytest.mark.parametrize("changes", WRONG_DETAILS, ids=repr)
def test_a_manifest_whose_details_are_of_another_kind_is_told_by_every_command(
    root: Path, changes: dict
) -> None:
    reseal(the_manifest(root), **changes)
    assert files_of(verify_cache(root)) == {"pairs/demo/train/manifest.json": "damaged"}
    assert [entry.name for entry in read_contents(root).pair_sets] == ["demo/train"]
    for use in (
        lambda: dpo_cache.train(root, root.parent / "run"),
        lambda: export_pairs(root, "demo", root.parent / "out.parquet"),
        lambda: merge_caches([root], root.parent / "all"),
    ):
        with pytest.raises(CorruptShardError, match="manifest.json: "):
            use()
    repair_cache(root, verify_cache(root))
    assert verify_cache(root).is_whole


@pytest.mark.parametrize("identity", ["x", [], 7, None], ids=repr)
def test_an_identity_that_is_no_object_is_damage(root: Path, identity: object) -> None:
    entry = root / f"references/{digest_json(identity)}/reference.json"
    entry.parent.mkdir()
    entry.write_bytes(seal_document({"identity": identity, "provenance": {}}))
    assert files_of(verify_cache(root)) == {entry.relative_to(root).as_posix(): "damaged"}
    assert [reference.damage != [] for reference in read_contents(root).references].count(True) == 1


def test_keys_that_are_not_of_their_token_ids_are_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.store.format.pair_tables.completion_key", lambda completion: key_of(33))
    add_pairs(Cache(root), Cache(root).references()[0], [(0, 1)], name="false")
    monkeypatch.undo()
    assert completion_key(completion(0)) != key_of(33)
    (problem,) = verify_cache(root).problems
    assert problem.file.startswith("pairs/false/train/") and problem.file.endswith(".parquet")
    assert "a chosen_key that is not of its token ids" in problem.found


def test_leftovers_and_strangers_are_told_but_are_no_damage(root: Path) -> None:
    part = next((root / "pairs/demo/train").glob("*.parquet")).name
    cache = Cache(root)
    add_pairs(cache, cache.references()[0], [(2, 3)])
    (root / "notes.txt").write_text("mine")
    report = verify_cache(root)
    assert report.is_whole
    assert (report.unreferenced, report.unknown) == ([f"pairs/demo/train/{part}"], ["notes.txt"])


def test_the_parts_of_a_damaged_manifest_are_not_called_leftovers(root: Path) -> None:
    flip_file(the_manifest(root), 40)
    report = verify_cache(root)
    assert files_of(report) == {"pairs/demo/train/manifest.json": "damaged"} and report.unreferenced == []
    repair_cache(root, report)
    assert len(verify_cache(root).unreferenced) == 1


@pytest.mark.parametrize("is_folder", [False, True])
def test_links_are_problems_and_are_not_followed(root: Path, tmp_path: Path, is_folder: bool) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("s")
    target = tmp_path / "outside" if is_folder else tmp_path / "outside" / "secret"
    (root / "pairs" / "linked").symlink_to(target)
    report = verify_cache(root)
    assert files_of(report) == {"pairs/linked": "link"} and not report.unknown
    repair_cache(root, report)
    assert verify_cache(root).is_whole and (tmp_path / "outside" / "secret").read_text() == "s"


def test_repair_keeps_the_content_and_takes_back_what_the_pair_set_holds(root: Path) -> None:
    shard = shards(root)[0]
    flip_file(shard, 60)
    bad = shard.read_bytes()
    report = verify_cache(root)
    repaired = repair_cache(root, report)
    (moved,) = repaired.moved
    assert (root / str(moved.to)).read_bytes() == bad
    assert not shard.exists() or shard.read_bytes() != bad  # all of it put back has its old name
    assert verify_cache(root).is_whole
    assert repaired.restored == 2  # of 0 and 1, or of 2, 3 and 4, of which the pair set has no 4
    assert repaired.lost is not None and repaired.restored + repaired.lost == moved.completions
    (line,) = repaired.commands
    assert line.startswith("dpo-cache precompute --model example/tiny --dataset example/pairs --cache ")
    assert line.endswith(
        " --dtype float32 --name demo --split train --format text --max-length 64 --truncation keep-start"
    )


def test_values_that_were_put_back_are_the_same(root: Path) -> None:
    reference = Cache(root).references()[0]
    numbers = [0, 1, 2, 3]
    before = [
        score.token_logps.tolist()
        for score in Cache(root).scores(reference).fetch([key_of(number) for number in numbers])
    ]
    for shard in shards(root):
        flip_file(shard, 60)
    repaired = repair_cache(root, verify_cache(root))
    assert (repaired.restored, repaired.lost) == (4, 1)  # the fifth is in no pair set
    after = [
        score.token_logps.tolist()
        for score in Cache(root).scores(reference).fetch([key_of(number) for number in numbers])
    ]
    assert after == before


def test_of_two_shards_that_differ_both_are_moved_and_nothing_is_put_back(root: Path) -> None:
    write_shard(root, [(key_of(4), value(4, 0.5))])
    report = verify_cache(root)
    repaired = repair_cache(root, report)
    assert {moved.file for moved in repaired.moved} == {report.problems[0].file, report.problems[0].other}
    assert repaired.restored == 0 and verify_cache(root).is_whole


def test_a_remote_cache_is_verified_and_repaired_alike(root: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in contents(root).items():
        memory.pipe_file(f"/verify-test/{name}", content)
    try:
        assert verify_cache("memory://verify-test").is_whole
        name = shards(root)[0].relative_to(root).as_posix()
        content = bytearray(memory.cat_file(f"/verify-test/{name}"))
        content[40] ^= 1
        memory.pipe_file(f"/verify-test/{name}", bytes(content))
        report = verify_cache("memory://verify-test")
        assert files_of(report) == {name: "damaged"}
        (moved,) = repair_cache("memory://verify-test", report).moved
        assert memory.cat_file(f"/verify-test/{moved.to}") == bytes(content)
        assert verify_cache("memory://verify-test").is_whole
    finally:
        memory.rm("/verify-test", recursive=True)
