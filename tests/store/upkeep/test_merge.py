"""merge is order-free and idempotent; diff sees what a merge would bring."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CacheError, CorruptShardError, FormatError
from dpo_cache.store import Cache, open_cache
from dpo_cache.store import pairs as pairs_module
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.upkeep import key_ranges, row_files
from dpo_cache.store.upkeep.diff import diff_caches
from dpo_cache.store.upkeep.merge import merge_caches
from dpo_cache.store.upkeep.run_record import RunRecord
from dpo_cache.store.upkeep.verify import verify_cache
from dpo_cache.types import Pair, Score, ScoredPair
from tests.store.caches import (
    PROVENANCE,
    SOURCE,
    TOKENIZATION,
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

numbers = st.integers(0, 12)
made_of = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.lists(st.lists(numbers, unique=True, min_size=1, max_size=4), max_size=3),
        st.lists(st.tuples(numbers, numbers), max_size=3),
    ),
    max_size=2,
)


def build(root: Path, recipe: list, where: str) -> Path:
    """A cache of up to two references; pair sets are named by what they hold, so names never conflict."""
    cache = open_cache(root, create=True)
    cache.publish_format()
    for weights, shards, pairs in recipe:
        reference = add_reference(cache, weights, provenance={**PROVENANCE, "model": where})
        for shard in shards:
            add_scores(cache, reference, shard)
        if pairs:
            add_pairs(
                cache,
                reference,
                pairs,
                name=f"{weights}-{'-'.join(f'{one}.{other}' for one, other in pairs)}",
            )
    return root


@given(st.lists(made_of, min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_any_order_gives_the_same_files_and_a_second_merge_none(recipes: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            build(Path(folder, f"source{index}"), recipe, f"example/{index}")
            for index, recipe in enumerate(recipes)
        ]
        results = []
        for index, order in enumerate(itertools.permutations(sources)):
            merge_caches(order, Path(folder, f"all{index}"))
            results.append(contents(Path(folder, f"all{index}")))
            assert merge_caches(order[::-1], Path(folder, f"all{index}")).copied_files == 0
            assert contents(Path(folder, f"all{index}")) == results[-1]
        assert all(result == results[0] for result in results)
        one_by_one = Path(folder, "one-by-one")
        for source in sources:
            merge_caches([source], one_by_one)
        # only the provenance may differ, because the first source's is kept
        assert contents(one_by_one).keys() == results[0].keys()
        if any(recipes):
            assert verify_cache(one_by_one).is_whole
            assert diff_caches(one_by_one, Path(folder, "all0")).is_equal


def test_every_digest_is_checked_on_the_way(tmp_path: Path) -> None:
    make_cache(tmp_path / "a")
    patterns = (
        "references/*/reference.json",
        "references/*/scores/*.parquet",
        "pairs/demo/train/manifest.json",
        "pairs/demo/train/*.parquet",
    )
    for number, pattern in enumerate(patterns):
        shutil.copytree(tmp_path / "a", tmp_path / f"bad{number}")
        flip_file(next((tmp_path / f"bad{number}").glob(pattern)), 60)
        with pytest.raises(CorruptShardError):
            merge_caches([tmp_path / f"bad{number}"], tmp_path / f"all{number}")
        # the files that were copied before are used, and the others follow
        merge_caches([tmp_path / "a"], tmp_path / f"all{number}")
        assert (
            diff_caches(tmp_path / "a", tmp_path / f"all{number}").is_equal
            and verify_cache(tmp_path / f"all{number}").is_whole
        )


def test_the_same_pairs_scored_twice_are_one_pair_set(tmp_path: Path) -> None:
    make_cache(tmp_path / "a")
    cache = make_cache(tmp_path / "b", pairs=())
    add_pairs(
        cache,
        cache.references()[0],
        [(0, 1), (2, 3)],
        shift=1e-5,
        source={"dataset": "elsewhere", "format": "text", "created": "2025-02-02T00:00:00+00:00"},
    )
    report = merge_caches([tmp_path / "b"], tmp_path / "a")
    assert (report.pair_sets, report.copied_files) == ([], 0)


@pytest.fixture
def conflict(tmp_path: Path) -> tuple[Path, Path]:
    make_cache(tmp_path / "a", pairs=((0, 1), (2, 3)))
    make_cache(tmp_path / "b", pairs=((0, 1), (2, 4)))
    return tmp_path / "a", tmp_path / "b"


def test_a_conflict_is_listed_and_nothing_is_copied(conflict: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        merge_caches(conflict, tmp_path / "all")
    reference = Cache(conflict[0]).references()[0][:12]
    assert str(caught.value) == (
        "one pair set has another content in another cache; nothing was copied:\n"
        f"  demo/train in {conflict[0]}: 2 pairs of reference {reference}, 2025-01-01T00:00:00+00:00\n"
        f"  demo/train in {conflict[1]}: 2 pairs of reference {reference}, 2025-01-01T00:00:00+00:00\n"
        "Keep all with `rename`, or one with `prefer` src or `prefer` dest."
    )
    assert not (tmp_path / "all").exists()


def test_prefer_takes_one(conflict: tuple[Path, Path]) -> None:
    a, b = conflict
    before = Cache(a).pairs("demo").manifest
    assert merge_caches([b], a, prefer="dest").kept == ["demo/train"]
    assert Cache(a).pairs("demo").manifest == before
    merge_caches([b], a, prefer="src")
    assert Cache(a).pairs("demo").manifest == Cache(b).pairs("demo").manifest
    assert verify_cache(a).is_whole


def test_prefer_dest_cannot_choose_between_sources(conflict: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        CacheError,
        match="nothing was copied(.|\n"
        ")*The destination has none to prefer: keep all with `rename`, or the last source's",
    ):
        merge_caches(conflict, tmp_path / "all", prefer="dest")


def test_rename_keeps_all_and_is_order_free_and_idempotent(
    conflict: tuple[Path, Path], tmp_path: Path
) -> None:
    merge_caches(conflict, tmp_path / "one", rename=True)
    merge_caches(conflict[::-1], tmp_path / "other", rename=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert merge_caches(conflict, tmp_path / "one", rename=True).copied_files == 0
    names = Cache(tmp_path / "one").pair_sets()
    assert (
        len(names) == 2
        and all(name.startswith("demo-") for name in names)
        and verify_cache(tmp_path / "one").is_whole
    )
    report = merge_caches([conflict[1]], conflict[0], rename=True)
    assert "demo/train" in Cache(conflict[0]).pair_sets() and len(report.renamed) == 1


def test_the_destinations_provenance_stays(tmp_path: Path) -> None:
    for name in "ab":
        add_reference(
            open_cache(tmp_path / name, create=True), provenance={**PROVENANCE, "model": f"/models/{name}"}
        )
    merge_caches([tmp_path / "b"], tmp_path / "a")
    cache = Cache(tmp_path / "a")
    assert cache.read_reference(cache.references()[0])["provenance"]["model"] == "/models/a"


def test_urls_are_caches_too(tmp_path: Path) -> None:
    make_cache(tmp_path / "a")
    try:
        merge_caches([tmp_path / "a"], "memory://union-test")
        merge_caches(["memory://union-test"], tmp_path / "b")
        assert (
            contents(tmp_path / "a") == contents(tmp_path / "b")
            and diff_caches(tmp_path / "a", "memory://union-test").is_equal
        )
    finally:
        fsspec.filesystem("memory").rm("/union-test", recursive=True)


def test_a_source_that_is_no_cache_is_an_error(tmp_path: Path) -> None:
    make_cache(tmp_path / "a")
    with pytest.raises(FormatError, match="no dpo-cache here"):
        merge_caches([tmp_path / "a", tmp_path / "nothing"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


# -- values that disagree --------------------------------------------------------------------------------


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Path]:
    """Two caches with scores and a pair set each, that disagree on the completions 2 and 3 of 0 to 5."""
    for name, numbers, shift in (("a", (0, 1), 0.0), ("b", (4, 5), 0.25)):
        cache = open_cache(tmp_path / name, create=True)
        reference = add_reference(cache)
        add_scores(cache, reference, numbers)
        add_scores(cache, reference, (2, 3), shift=shift)
        add_pairs(cache, reference, [(2, 3)], name=f"of-{name}", shift=shift)
    return tmp_path / "a", tmp_path / "b"


def read_all(root: Path) -> tuple[dict[int, float], dict[str, list[float]]]:
    """The first token's log-prob of every completion, as any reader finds it; and those in the pair sets."""
    cache = Cache(root)
    (reference,) = cache.references()
    scores = cache.scores(reference).fetch([key_of(number) for number in range(6)])
    pairs = {
        name: [
            float(side.token_logps[0])
            for one in cache.pairs(name)
            for side in (one.ref_chosen, one.ref_rejected)
        ]
        for name in cache.pair_sets()
    }
    return {number: float(score.token_logps[0]) for number, score in enumerate(scores)}, pairs


def first_logp(number: int, shift: float = 0.0) -> float:
    return float(value(number, shift).token_logps[0])


def test_values_that_disagree_are_refused_and_nothing_is_copied(
    apart: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = apart
    for sources, destination, caches in (
        ([b], a, (a, b)),
        (apart, tmp_path / "all", (a, b)),
        ([a], b, (b, a)),
    ):
        before = contents(tmp_path)
        with pytest.raises(CacheError) as caught:
            merge_caches(sources, destination)
        reference = Cache(a).references()[0][:12]
        assert str(caught.value) == (
            "caches hold other values of the same completions; nothing was copied:\n"
            f"  reference {reference}: 2 completions differ by up to 0.25 nats a token (allowed 0.001) between "
            f"{caches[0]} and {caches[1]}\n"
            "Keep the destination's values with `prefer` dest, or the last source's with `prefer` src; "
            "`dpo-cache verify CACHE --rescore N --model MODEL` shows which are right."
        )
        assert contents(tmp_path) == before


@pytest.mark.parametrize(("prefer", "shift"), [("dest", 0.0), ("src", 0.25)])
def test_prefer_decides_what_every_reader_finds(apart: tuple[Path, Path], prefer: str, shift: float) -> None:
    a, b = apart
    report = merge_caches([b], a, prefer=prefer)
    assert report.overruled == {Cache(a).references()[0]: 2}
    scores, pairs = read_all(a)
    expected = {number: first_logp(number, shift if number in (2, 3) else 0.0) for number in range(6)}
    assert scores == expected
    assert pairs == {name: [expected[2], expected[3]] for name in ("of-a/train", "of-b/train")}
    assert not verify_cache(a).problems
    after = contents(a)
    assert merge_caches([b], a, prefer=prefer).copied_files == 0 and contents(a) == after
    # with the same preference any later merge of the result agrees
    assert merge_caches([a], b, prefer="src").copied_files > 0
    assert read_all(b) == (scores, pairs)


def test_of_several_sources_the_last_is_preferred(apart: tuple[Path, Path], tmp_path: Path) -> None:
    for order, shift in ((apart, 0.25), (apart[::-1], 0.0)):
        merge_caches(order, tmp_path / f"all{shift}", prefer="src")
        scores, pairs = read_all(tmp_path / f"all{shift}")
        assert [scores[2], scores[3]] == [first_logp(2, shift), first_logp(3, shift)]
        assert pairs["of-a/train"] == pairs["of-b/train"] == [scores[2], scores[3]]
        assert verify_cache(tmp_path / f"all{shift}").is_whole


def test_a_destination_without_values_cannot_be_preferred(apart: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="has no values to prefer for some of them: take the last source's"):
        merge_caches(apart, tmp_path / "all", prefer="dest")
    assert not (tmp_path / "all").exists()


def test_values_within_the_dtypes_tolerance_are_merged(tmp_path: Path) -> None:
    for dtype, shift, is_allowed in (
        ("float32", 5e-4, True), ("float32", 2e-3, False),
        ("bfloat16", 0.4, True), ("bfloat16", 0.6, False),
        ("float16", 0.09, True), ("float16", 0.2, False),
    ):  # fmt: skip
        folder = tmp_path / f"{dtype}-{shift}"
        for name, change in (("a", 0.0), ("b", shift)):
            cache = open_cache(folder / name, create=True)
            add_scores(cache, add_reference(cache, dtype=dtype), [1, 2], shift=change)
        if is_allowed:
            assert merge_caches([folder / "b"], folder / "a").copied_files == 1
        else:
            with pytest.raises(CacheError, match=f"2 completions differ by up to {shift} nats"):
                merge_caches([folder / "b"], folder / "a")


def test_pair_sets_of_one_name_and_other_values_are_refused(tmp_path: Path) -> None:
    """Also without scores, as `pull --pairs` leaves them; and where only one cache has scores."""
    for name, shift in (("a", 0.0), ("b", 0.5), ("c", 0.0)):
        cache = open_cache(tmp_path / name, create=True)
        add_pairs(cache, add_reference(cache), [(0, 1), (2, 3)], shift=shift)
    with pytest.raises(CacheError, match="4 completions differ by up to 0.5 nats"):
        merge_caches([tmp_path / "b"], tmp_path / "a")
    merge_caches([tmp_path / "b"], tmp_path / "a", prefer="src")
    assert [one.ref_chosen.token_logps[0] for one in Cache(tmp_path / "a").pairs("demo")] == [
        value(0, 0.5).token_logps[0], value(2, 0.5).token_logps[0],
    ]  # fmt: skip
    scored = open_cache(tmp_path / "c")
    add_scores(scored, scored.references()[0], [0, 1])
    with pytest.raises(CacheError, match="4 completions differ"):
        merge_caches([tmp_path / "b"], tmp_path / "c")
    merge_caches([tmp_path / "b"], tmp_path / "c", prefer="src")
    assert verify_cache(tmp_path / "c").is_whole
    scores = scored.scores(scored.references()[0]).fetch([key_of(0), key_of(1)])
    assert [score.token_logps[0] for score in scores] == [first_logp(0, 0.5), first_logp(1, 0.5)]


def test_a_value_in_many_shards_and_ranges_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ranges, "RANGE_BYTES", 3000)
    for name, wrong in (("a", -1), ("b", 37)):
        cache = open_cache(tmp_path / name, create=True)
        reference = add_reference(cache)
        for start in range(0, 40, 8):
            numbers = range(start, start + 8) if name == "a" else range(start // 8, 40, 5)
            scores = [(key_of(number), value(number, 0.1 if number == wrong else 1e-5)) for number in numbers]
            cache.scores(reference).publish(scores)
    with pytest.raises(CacheError, match="1 completions differ by up to 0.1 nats"):
        merge_caches([tmp_path / "b"], tmp_path / "a")
    report = merge_caches([tmp_path / "b"], tmp_path / "a", prefer="dest")
    assert report.overruled == {reference: 1} and verify_cache(tmp_path / "a").is_whole


def test_equal_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "a")
    merge_caches([tmp_path / "a"], tmp_path / "b")
    opened: list[str] = []
    real = row_files.open_unverified
    monkeypatch.setattr(
        row_files,
        "open_unverified",
        lambda folder, name, *given, **options: opened.append(name) or real(folder, name, *given, **options),
    )
    merge_caches([tmp_path / "a"], tmp_path / "b")
    assert opened == []


def test_scores_of_a_run_at_work_are_not_written_anew(apart: tuple[Path, Path]) -> None:
    a, b = apart
    cache = Cache(a)
    (reference,) = cache.references()
    with RunRecord(cache, reference) as record:
        cache.scores(reference).publish([(key_of(4), value(4, 0.7))], record.add_shard)
        before = contents(a)
        with pytest.raises(CacheError, match="a run of `dpo-cache precompute` is at work on these scores"):
            merge_caches([b], a, prefer="src")
        assert contents(a) == before
    merge_caches([b], a, prefer="src")
    assert read_all(a)[0][4] == first_logp(4)


def test_a_merge_killed_at_any_file_is_finished_by_the_next(
    apart: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every completion has a value of one of the caches all the time, and the preferred one at the end."""
    a, b = apart
    whole = tmp_path / "whole"
    shutil.copytree(a, whole)
    merge_caches([b], whole, prefer="src")
    result = read_all(whole)
    for steps in itertools.count():
        target = tmp_path / f"killed-after-{steps}"
        shutil.copytree(a, target)
        left = iter(range(steps))
        with monkeypatch.context() as patch:
            for step in ("rename", "unlink"):
                patch.setattr(Disk, step, _limited(getattr(Disk, step), left))
            try:
                merge_caches([b], target, prefer="src")
                is_killed = False
            except KeyboardInterrupt:
                is_killed = True
        scores = Cache(target).scores(Cache(target).references()[0])
        assert scores.contains([key_of(number) for number in range(4)]).all()
        merge_caches([b], target, prefer="src")
        assert read_all(target) == result
        if not is_killed:
            break
    assert steps > 5


def _limited(method: object, left: Iterator[int]) -> object:
    def limited(disk: Disk, path: Path, *more: Path) -> None:
        is_scratch = path.suffix == ".tmp" and not more  # which its writer removes all the same
        if not is_scratch and next(left, None) is None:
            raise KeyboardInterrupt("killed")
        return method(disk, path, *more)  # type: ignore[operator]

    return limited


# -- diff ----------------------------------------------------------------------------------------------


def test_a_cache_does_not_differ_from_itself_or_its_compacted_copy(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert diff_caches(tmp_path / "a", tmp_path / "b").is_equal
    from dpo_cache.store.upkeep.compact import compact_reference

    compact_reference(Cache(tmp_path / "b"), cache.references()[0])
    assert diff_caches(tmp_path / "a", tmp_path / "b").is_equal


def test_what_only_one_has_is_told(tmp_path: Path) -> None:
    one, other = make_cache(tmp_path / "a"), make_cache(tmp_path / "b")
    reference = one.references()[0]
    only = add_reference(other, "b")
    add_scores(one, reference, [20, 21])
    add_scores(other, reference, [30])
    add_pairs(one, reference, [(20, 21)], name="new")
    report = diff_caches(tmp_path / "a", tmp_path / "b")
    assert (report.references_only_a, report.references_only_b) == ([], [only])
    scores = report.scores[reference]
    assert (scores.only_a, scores.only_b, scores.both, scores.differing) == (2, 1, 5, 0)
    assert (report.pair_sets_only_a, report.pair_sets_only_b, report.pair_sets) == (["new/train"], [], {})
    mirrored = diff_caches(tmp_path / "b", tmp_path / "a")
    assert mirrored.references_only_a == [only] and mirrored.scores[reference].only_a == 1


def test_values_beyond_rounding_are_told_those_within_are_not(tmp_path: Path) -> None:
    make_cache(tmp_path / "a", shards=((0, 1),), pairs=())
    other = open_cache(tmp_path / "b", create=True)
    reference = add_reference(other)
    add_scores(other, reference, [0], shift=2e-4)
    add_scores(other, reference, [1], shift=0.25)
    scores = diff_caches(tmp_path / "a", tmp_path / "b").scores[reference]
    assert (scores.differing, scores.both) == (1, 2) and scores.largest_gap == pytest.approx(0.25, abs=1e-6)


def test_pair_sets_that_differ_say_in_what(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "a")
    other = make_cache(tmp_path / "b", pairs=())
    reference = one.references()[0]
    details = {
        "tokenization": {
            "tokenizer": "example/tiny",
            "chat_template": None,
            "max_length": 32,
            "truncation": "drop",
            "max_prompt_length": None,
        }
    }
    add_pairs(other, reference, [(0, 1)], **details)
    (lines,) = diff_caches(tmp_path / "a", tmp_path / "b").pair_sets.values()
    assert {
        "num_pairs: 2 and 1",
        "tokenization.max_length: 64 and 32",
        "tokenization.truncation: keep-start and drop",
    } <= set(lines)


def test_pair_sets_of_other_values_say_so(tmp_path: Path) -> None:
    make_cache(tmp_path / "a")
    other = make_cache(tmp_path / "b", pairs=())
    add_pairs(other, other.references()[0], [(0, 1), (2, 3)], shift=0.5)
    (lines,) = diff_caches(tmp_path / "a", tmp_path / "b").pair_sets.values()
    assert lines == ["values: 4 completions differ by up to 0.5 nats a token (allowed 0.001)"]


def test_imported_sums_have_no_values_to_differ_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same import, cut into other parts."""
    for name, part_pairs in (("a", 8192), ("b", 2)):
        monkeypatch.setattr(pairs_module, "PART_PAIRS", part_pairs)
        cache = open_cache(tmp_path / name, create=True)
        reference = cache.publish_reference(
            {"imported": "x", "dtype": None, "values": "0" * 64}, {"model": None}
        )
        writer = cache.write_pairs("sums", "train")
        sums = Score(np.empty(0, np.float32), -1.5)
        writer.add(
            [
                ScoredPair(Pair(row, completion(2 * row), completion(2 * row + 1)), sums, sums)
                for row in range(3)
            ]
        )
        details = {"pairs_digest": "0" * 64, "source": SOURCE, "tokenization": TOKENIZATION}
        writer.finish(
            {
                "name": "sums",
                "split": "train",
                "reference": reference,
                "imported": True,
                "token_logps": False,
                **details,
            }
        )
    assert len(open_cache(tmp_path / "b").pairs("sums").manifest["parts"]) == 2
    assert diff_caches(tmp_path / "a", tmp_path / "b").is_equal
