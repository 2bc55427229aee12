"""A folder of a group with the sticky bit, as /tmp has it: nobody may rename or remove what another has
written. Upkeep does what this user may do, and leaves a valid cache.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_cache.store import Cache, open_cache
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.copy import copy_cache
from dpo_cache.store.upkeep.gc import collect_garbage, find_garbage
from dpo_cache.store.upkeep.merge import merge_caches
from dpo_cache.store.upkeep.open_runs import records_of_killed_runs
from dpo_cache.store.upkeep.remove import plan_removal, remove
from dpo_cache.store.upkeep.repair import repair_cache
from dpo_cache.store.upkeep.run_record import RunRecord, end_killed_runs
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import TOKENIZATION, add_pairs, add_scores, contents, make_cache
from tests.store.other_user import OTHER, as_other_user, needs_root
from tests.store.upkeep.conftest import reference_of


@pytest.fixture
def shared() -> Iterator[Path]:
    """A cache of root in a folder that everyone may write, and not in one of pytest's, which are closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = Path(folder, "cache")
        make_cache(root)
        for path in (root, *root.rglob("*")):
            path.chmod(0o1777 if path.is_dir() else 0o644)
        yield root


def of_other(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def at(root: Path, act: Callable[[Cache], object]) -> str:
    """The result of the act of another user in the cache, as text."""
    return as_other_user(lambda: act(open_cache(root)))


@needs_root
def test_scores_that_may_not_be_removed_keep_the_entry_of_their_reference(shared: Path) -> None:
    cache = open_cache(shared)
    reference = reference_of(cache)
    entry = shared / f"references/{reference}/reference.json"
    for path in (entry, *shared.glob("pairs/demo/train/*"), min(entry.parent.glob("scores/*"))):
        of_other(path)
    before = set(contents(shared))
    at(shared, lambda cache: remove(cache, "reference", reference[:8], with_pairs=True))
    left = set(contents(shared))
    assert left < before and entry.exists() and verify_cache(shared).is_whole
    assert not list(shared.rglob(".*.going"))


@needs_root
def test_a_file_that_another_user_hid_stops_nobody(shared: Path) -> None:
    reference = reference_of(open_cache(shared))
    shard = min((shared / f"references/{reference}/scores").iterdir())
    shard.rename(shard.with_name(f".{shard.name}.going"))
    damaged = max((shared / f"references/{reference}/scores").glob("[!.]*"))
    damaged.write_bytes(b"damaged")
    of_other(damaged)
    assert "Traceback" not in at(shared, lambda cache: collect_garbage(cache, grace_s=0))
    assert "Moved(" in at(shared, lambda cache: repair_cache(shared, verify_cache(shared)))
    assert "Traceback" not in at(shared, lambda cache: plan_removal(cache, "pairs", "demo"))


@needs_root
def test_a_link_of_another_user_does_not_stop_a_repair(shared: Path) -> None:
    reference = reference_of(open_cache(shared))
    shard = min((shared / f"references/{reference}/scores").iterdir())
    (shard.parent / "link.parquet").symlink_to(shard)
    other = max(path for path in shard.parent.iterdir() if not path.is_symlink())
    other.write_bytes(b"damaged")
    of_other(other)
    said = at(shared, lambda cache: repair_cache(shared, verify_cache(shared)))
    assert "Traceback" not in said and "link.parquet" in said and not other.exists()


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o600], ids=["readable", "closed"])
@pytest.mark.parametrize("is_auditing", [False, True], ids=["scoring", "auditing"])
def test_the_record_of_a_killed_run_of_another_user_stops_no_run(
    shared: Path, mode: int, is_auditing: bool
) -> None:
    reference = reference_of(open_cache(shared))
    record = RunRecord(open_cache(shared), reference)
    record.add_shard(f"references/{reference}/scores/{'0' * 64}.parquet")
    if is_auditing:
        record.begin_audit()
    (shared / record._name).chmod(mode)

    def run(cache: Cache) -> str:
        remarks = end_killed_runs(cache, reference)
        with RunRecord(cache, reference) as own:
            own.add_shard(f"references/{reference}/scores/{'1' * 64}.parquet")
            own.begin_audit()
            own.end_audit()
        return f"done {remarks}"

    assert at(shared, run) == "done []"
    assert [path.name for path in shared.rglob(".run-*")] == [record._name.rpartition("/")[2]]


@needs_root
def test_a_merge_leaves_out_what_it_cannot_read_but_replaces_nothing_of_that(shared: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        manifest = shared / "pairs/demo/train/manifest.json"
        manifest.chmod(0o600)
        merged = at(shared, lambda cache: merge_caches([cache], Path(folder, "all")))
        assert "0 new pair sets" in merged
        make_cache(Path(folder, "own"))
        refused = at(shared, lambda cache: merge_caches([Path(folder, "own")], cache))
        assert "it has a pair set demo/train that cannot be read" in refused


# -- records of runs ---------------------------------------------------------------------------------------


def killed_run(cache: Cache, *, is_auditing: bool) -> Path:
    record = RunRecord(cache, reference_of(cache))
    record.add_shard(f"references/{reference_of(cache)}/scores/{'0' * 64}.parquet")
    if is_auditing:
        record.begin_audit()
    return Path(str(cache)) / record._name


def test_gc_takes_the_record_of_a_killed_run_but_not_one_that_the_next_audit_needs(
    cache: Cache, root: Path
) -> None:
    scoring, auditing = killed_run(cache, is_auditing=False), killed_run(cache, is_auditing=True)
    assert len(records_of_killed_runs(cache.folder, f"references/{reference_of(cache)}")) == 2
    collect_garbage(cache, grace_s=0)
    assert not scoring.exists() and auditing.exists()
    assert find_garbage(cache) == []
    (root / f"references/{reference_of(cache)}/reference.json").unlink()
    for manifest in root.glob("pairs/*/*/manifest.json"):
        manifest.unlink()
    assert [entry.why for entry in find_garbage(cache, grace_s=0) if ".run-" in entry.file] == [
        "the record of a run whose reference was removed"
    ]


def test_a_damaged_record_is_found_and_moved_aside(cache: Cache, root: Path) -> None:
    record = killed_run(cache, is_auditing=False)
    record.write_bytes(b"{}")
    report = verify_cache(root)
    assert [(problem.file, problem.kind) for problem in report.problems] == [
        (record.relative_to(root).as_posix(), "damaged")
    ]
    repair_cache(root, report)
    assert not record.exists() and verify_cache(root).is_whole
    compact_reference(cache, reference_of(cache))


# -- links and settings ------------------------------------------------------------------------------------


def test_a_link_that_leads_to_itself_is_one_problem(cache: Cache, root: Path) -> None:
    (root / "pairs/loop").symlink_to("loop")
    (root / f"references/{reference_of(cache)}/scores/loop.parquet").symlink_to("loop.parquet")
    assert {(problem.file, problem.kind) for problem in verify_cache(root).problems} == {
        ("pairs/loop", "link"),
        (f"references/{reference_of(cache)}/scores/loop.parquet", "link"),
    }
    assert cache.pair_sets() == ["demo/train"]
    collect_garbage(cache, grace_s=0)
    merge_caches([root], root.with_name("all"))
    assert verify_cache(root.with_name("all")).is_whole


@pytest.mark.parametrize("carry", ["copy", "merge"])
@pytest.mark.parametrize("is_newer", [True, False])
def test_newer_settings_of_the_same_pairs_arrive_and_older_ones_do_not(
    tmp_path: Path, carry: str, is_newer: bool
) -> None:
    one, other = (make_cache(tmp_path / name, pairs=()) for name in ("one", "other"))
    dates = ("2025-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00")
    for cache, length, date in ((one, 64, dates[is_newer]), (other, 32, dates[not is_newer])):
        source = {"dataset": "example/pairs", "format": "text", "created": date}
        tokenization = {**TOKENIZATION, "max_length": length}
        add_pairs(cache, cache.references()[0], [(0, 1)], source=source, tokenization=tokenization)
    if carry == "copy":
        copy_cache(one, other)
    else:
        merge_caches([tmp_path / "one"], tmp_path / "other")
    assert other.pairs("demo").manifest["tokenization"]["max_length"] == (64 if is_newer else 32)
    if carry == "copy":
        assert copy_cache(one, other).files_sent == 0


def test_a_merge_completes_a_pair_set_of_the_destination_that_lacks_a_part(tmp_path: Path) -> None:
    make_cache(tmp_path / "one")
    other = make_cache(tmp_path / "other")
    for part in (tmp_path / "other/pairs/demo/train").glob("*.parquet"):
        part.unlink()
    merge_caches([tmp_path / "one"], tmp_path / "other")
    assert other.pairs("demo").is_complete() and verify_cache(tmp_path / "other").is_whole


def test_scores_without_the_entry_of_their_reference_are_leftovers(cache: Cache, root: Path) -> None:
    """As a command leaves them that is killed while another removes the reference."""
    remove(cache, "reference", reference_of(cache), with_pairs=True)
    add_scores(cache, "0" * 64, [1, 2])
    report = verify_cache(root)
    assert report.is_whole and len(report.unreferenced) == 1
    merged = merge_caches([root], root.with_name("all"))
    assert merged.copied_files == 0
    collect_garbage(cache, grace_s=0)
    assert not list(root.rglob("*.parquet"))
