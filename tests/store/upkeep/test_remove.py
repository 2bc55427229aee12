"""remove: which files a reference or a pair set takes along, and an order that leaves a valid cache."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpo_cache.errors import CacheError, NotInCacheError, StorageError
from dpo_cache.store import Cache, ScoreIndex
from dpo_cache.store.upkeep.remove import plan_removal, remove_files
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_pairs, contents, key_of
from tests.store.upkeep.conftest import reference_of


def test_a_pair_set_is_removed_whole_and_no_other(cache: Cache, root: Path) -> None:
    add_pairs(cache, reference_of(cache), [(4, 5)], name="other")
    removal = plan_removal(cache, "pairs", "demo")
    assert removal.pair_sets == ["demo/train"] and len(removal.files) == 2
    remove_files(cache, list(removal.files))
    assert (
        cache.pair_sets() == ["other/train"]
        and not (root / "pairs/demo").exists()
        and verify_cache(root).is_whole
    )


def test_a_reference_with_pair_sets_is_refused_and_they_are_listed(cache: Cache, root: Path) -> None:
    reference = reference_of(cache)
    with pytest.raises(
        CacheError, match=rf"reference {reference[:12]} has pair sets: demo/train\.\n.*`with_pairs`"
    ):
        plan_removal(cache, "reference", reference[:6])
    removal = plan_removal(cache, "reference", reference[:6], with_pairs=True)
    remove_files(cache, list(removal.files))
    assert list(contents(root)) == ["format.json"]


def test_a_missing_entry_is_named(cache: Cache) -> None:
    with pytest.raises(NotInCacheError, match="no pair set 'nothing'"):
        plan_removal(cache, "pairs", "nothing")
    with pytest.raises(NotInCacheError, match="no reference whose id starts with 'zz'"):
        plan_removal(cache, "reference", "zz")


def test_a_removal_cut_off_anywhere_leaves_a_valid_cache(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plan_removal(cache, "reference", reference_of(cache), with_pairs=True).files
    spare, remove = root.with_name("spare"), cache.folder.remove
    shutil.copytree(root, spare)
    for length in range(len(files)):
        shutil.rmtree(root)
        shutil.copytree(spare, root)
        left = iter(range(length))

        def remove_or_die(name: str, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            remove(name)

        monkeypatch.setattr(cache.folder, "remove", remove_or_die)
        with pytest.raises(KeyboardInterrupt):
            remove_files(cache, sorted(files, reverse=True))
        assert verify_cache(root).is_whole and len(contents(root)) == len(contents(spare)) - length


def test_the_index_of_a_removed_reference_names_the_missing_file(cache: Cache) -> None:
    index: ScoreIndex = cache.scores(reference_of(cache))
    remove_files(cache, list(plan_removal(cache, "reference", reference_of(cache), with_pairs=True).files))
    with pytest.raises(StorageError, match="cannot read"):
        index.fetch([key_of(0)])
    assert np.array_equal(index.contains([key_of(0)]), [False])
