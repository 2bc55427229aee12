"""Promise 6: a hostile file can neither run code nor exhaust memory, however well its name fits its bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CacheError, CorruptShardError
from dpo_cache.store import ScoreIndex, open_cache
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.format import parquet
from dpo_cache.store.format.documents import open_sealed, seal_document
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.format.parquet import name_by_content
from dpo_cache.store.format.shards import encode_shard
from dpo_cache.store.pairs import PairSet
from tests.promises.bad_data import ALL
from tests.promises.hostile import READ_ALL_THE_SAME, rewritten
from tests.promises.small_cache import make_small_cache, read_small_cache
from tests.store.conftest import key, make_pairs, make_scores, plain

LIMIT_BYTES = 300 * 2**20

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does"
)


# -- made by hand ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """What reading each file came to, in a process that may take a gigabyte more and no further."""
    command = [sys.executable, "-m", "tests.promises.bad_data", *ALL]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    return {outcome["file"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


@needs_proc
@pytest.mark.parametrize("name", ALL)
def test_a_file_made_by_hand_is_refused_in_little_memory(
    outcomes: dict[str, dict[str, Any]], name: str
) -> None:
    outcome = outcomes[name]
    assert outcome["rise_bytes"] < LIMIT_BYTES
    if name in READ_ALL_THE_SAME:
        assert outcome["error"] is None
    else:
        assert outcome["error"].startswith("CorruptShardError: ")


# -- mutated -----------------------------------------------------------------------------------------------

INTERESTING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 4 + b"\x0f",
    b"\xff" * 9 + b"\x01",
    b"\xff\xff\xff\x7f",
    bytes(8),
]


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, Any]]:
    """One to four changes: bytes overwritten, put in, taken out, or copied from elsewhere; half of them near
    the end, where the footer is.
    """
    places = st.integers(0, 2**16) | st.integers(-600, -1)
    changes = st.one_of(
        st.tuples(
            st.just("overwrite"), places, st.binary(min_size=1, max_size=4) | st.sampled_from(INTERESTING)
        ),
        st.tuples(
            st.just("insert"), places, st.binary(min_size=1, max_size=8) | st.sampled_from(INTERESTING)
        ),
        st.tuples(st.just("remove"), places, st.integers(1, 40)),
        st.tuples(st.just("copy"), places, st.tuples(places, st.integers(1, 64))),
    )
    return draw(st.lists(changes, min_size=1, max_size=4))


def mutate(content: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    for kind, place, detail in changes:
        at = place % max(len(content), 1)
        if kind == "copy":
            start = detail[0] % max(len(content), 1)
            detail = content[start : start + detail[1]]
        gone = 0 if kind == "insert" else detail if kind == "remove" else len(detail)
        content = content[:at] + (b"" if kind == "remove" else detail) + content[at + gone :]
    return content


NUMBERS = [3, 11, 4, 250]
SHARD = encode_shard(make_scores(NUMBERS))
PLAIN_SHARD = rewritten(SHARD, compression="none")  # a changed byte reaches the decoder as it is


def read_shard_of(root: Path, content: bytes) -> object:
    """What the scores of a folder with this shard are read as."""
    folder = LocalFolder(root)
    for name in folder.names("scores"):
        folder.remove(f"scores/{name}")
    (root / "scores").mkdir(parents=True, exist_ok=True)
    (root / "scores" / name_by_content(content)).write_bytes(content)
    return [
        score.token_logps.tolist()
        for score in ScoreIndex(folder, "scores").fetch([key(number) for number in NUMBERS])
    ]


PAIRS = make_pairs(5)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("pairs")
    writer = open_cache(root, create=True).write_pairs("dialogues", "train")
    writer.add(PAIRS)
    (listed,) = writer.finish({"name": "dialogues", "split": "train", "reference": "0" * 64})["parts"]
    return (root / "pairs/dialogues/train" / listed["file"]).read_bytes()


def read_part_of(root: Path, content: bytes) -> object:
    """What a pair set with this part is read as, its manifest made to fit."""
    place = root / "pairs/dialogues/train"
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    name = name_by_content(content)
    (place / name).write_bytes(content)
    parts = [{"file": name, "rows": len(PAIRS), "bytes": max(len(content), 1)}]
    manifest = {
        "format": "dpo-cache pairs",
        "name": "dialogues",
        "split": "train",
        "reference": "0" * 64,
        "num_pairs": len(PAIRS),
        "parts": parts,
    }
    (place / "manifest.json").write_bytes(seal_document(manifest))
    folder = LocalFolder(root)
    return [
        plain(scored)
        for scored in PairSet(folder, "pairs/dialogues/train", read_manifest(folder, "pairs/dialogues/train"))
    ]


POOL = pa.proxy_memory_pool(pa.default_memory_pool())  # must outlive all that is allocated from it


@pytest.fixture
def counted_memory() -> Iterator[None]:
    """No reading takes more memory than any file may."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(POOL)
    yield
    pa.set_memory_pool(before)
    assert (POOL.max_memory() or 0) < LIMIT_BYTES


def read_mutated(read: Callable[[Path, bytes], object], root: Path, content: bytes) -> object:
    """What the mutated content is read as, None where it is refused."""
    try:
        return read(root, content)
    except CacheError:
        return None


def check_mutations(
    read: Callable[[Path, bytes], object],
    root: Path,
    content: bytes,
    num_examples: int,
    *,
    checksums: bool = True,
) -> None:
    """Each mutation ends in a clean error or in what was written; without checksums in values that are
    well-formed.
    """
    whole = read(root, content)

    @settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(mutations())
    def check(changes: list[tuple[str, int, Any]]) -> None:
        found = read_mutated(read, root, mutate(content, changes))
        assert found is None or found == whole or not checksums

    check()


@pytest.fixture
def without_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are not checked, as if whoever mutates them made their checksums fit as well."""
    original = parquet.pq.ParquetFile

    def open_unchecked(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "page_checksum_verification": False})

    monkeypatch.setattr(parquet.pq, "ParquetFile", open_unchecked)


def test_a_mutated_shard_is_refused_or_read_as_it_was(counted_memory: None, tmp_path: Path) -> None:
    check_mutations(read_shard_of, tmp_path, SHARD, 120)


def test_a_mutated_part_is_refused_or_read_as_it_was(
    counted_memory: None, tmp_path: Path, part: bytes
) -> None:
    check_mutations(read_part_of, tmp_path, part, 120)


def test_mutated_pages_whose_checksums_fit_harm_nothing(
    counted_memory: None, tmp_path: Path, part: bytes, without_checksums: None
) -> None:
    check_mutations(read_shard_of, tmp_path, PLAIN_SHARD, 60, checksums=False)
    check_mutations(read_part_of, tmp_path, part, 60, checksums=False)


@pytest.mark.slow
def test_many_mutated_shards_are_refused_or_read_as_they_were(counted_memory: None, tmp_path: Path) -> None:
    check_mutations(read_shard_of, tmp_path, SHARD, 2000)


@pytest.mark.slow
def test_many_mutated_parts_are_refused_or_read_as_they_were(
    counted_memory: None, tmp_path: Path, part: bytes
) -> None:
    check_mutations(read_part_of, tmp_path, part, 2000)


@pytest.mark.slow
def test_many_mutated_pages_whose_checksums_fit_harm_nothing(
    counted_memory: None, tmp_path: Path, part: bytes, without_checksums: None
) -> None:
    check_mutations(read_shard_of, tmp_path, PLAIN_SHARD, 1000, checksums=False)
    check_mutations(read_part_of, tmp_path, part, 1000, checksums=False)


@given(mutations())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_mutated_document_is_refused(changes: list[tuple[str, int, Any]]) -> None:
    content = seal_document(
        {"identity": {"dtype": "float32", "layers": [1, 2]}, "provenance": {"model": "example/tiny"}}
    )
    mutated = mutate(content, changes)
    if mutated != content:
        with pytest.raises(CorruptShardError):
            open_sealed(mutated, "there")


# -- documents ---------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_small_cache(tmp_path / "cache")


def reseal(root: Path, **changes: Any) -> None:
    manifest = {**open_cache(root).pairs("dialogues").manifest, **changes}
    (root / "pairs/dialogues/train/manifest.json").write_bytes(seal_document(manifest))


@pytest.mark.parametrize(
    "file",
    ["../x", "/etc/passwd", "../../../references/a.parquet", "0" * 64, "0" * 64 + ".parquet/..", "A" * 64 + ".parquet", "", None, 7],
    ids=repr,
)  # fmt: skip
def test_a_part_is_named_by_a_digest_and_nothing_else(root: Path, file: object) -> None:
    reseal(root, parts=[{"file": file, "rows": 9, "bytes": 1}])
    with pytest.raises(
        CorruptShardError, match="manifest.json: expected the manifest of a 'dpo-cache pairs'"
    ):
        read_small_cache(root)


@pytest.mark.parametrize("rows", [-1, 0, 2**40, 1.0, True, "9", None, 8193], ids=repr)
def test_a_part_has_a_possible_number_of_rows(root: Path, rows: object) -> None:
    reseal(root, parts=[{"file": "0" * 64 + ".parquet", "rows": rows, "bytes": 1}], num_pairs=rows)
    with pytest.raises(CorruptShardError, match=r"manifest\.json: "):
        read_small_cache(root)


@pytest.mark.parametrize(
    "changes",
    [{"parts": {}}, {"parts": [7]}, {"parts": None}, {"num_pairs": "9"}, {"num_pairs": 2**70}, {"name": "../.."}, {"name": ["a"]},
     {"split": "\x1b[2J"}, {"reference": "../../x"}, {"reference": None}],
    ids=repr,
)  # fmt: skip
def test_a_manifest_of_another_shape_is_refused(root: Path, changes: dict[str, Any]) -> None:
    reseal(root, **changes)
    with pytest.raises(CorruptShardError, match=r"manifest\.json: "):
        read_small_cache(root)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"n": ' + b"9" * 100_000 + b"}", b'{"n": 1e999999}', b'{"a": NaN}', b'{"\\ud800": 1}', b"\xff\xfe{}"],
    ids=["lists", "objects", "number", "exponent", "nan", "surrogate", "utf-16"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["format.json", "reference.json", "manifest.json"])
def test_json_that_is_meant_to_harm_is_refused(root: Path, name: str, content: bytes) -> None:
    (path,) = root.rglob(name)
    path.write_bytes(content)
    with pytest.raises(CacheError, match=name):
        read_small_cache(root)


@pytest.mark.parametrize(
    "pattern", ["format.json", "reference.json", "manifest.json", "scores/*.parquet", "train/*.parquet"]
)
def test_a_file_larger_than_any_of_the_cache_is_not_read(root: Path, pattern: str) -> None:
    path = next(iter(root.rglob(pattern)))
    os.truncate(path, 2**40)  # takes no room on the disk
    with pytest.raises(CorruptShardError, match=f"{path.name}: .*1099511627776 bytes long"):
        read_small_cache(root)


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "format.json",
        "reference.json",
        "manifest.json",
        "scores/*.parquet",
        "train/*.parquet",
        "scores",
        "dialogues",
    ],
)
def test_a_link_that_leads_out_of_the_cache_is_refused(root: Path, tmp_path: Path, pattern: str) -> None:
    path = next(iter(root.rglob(pattern)))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptShardError, match="a link that leads out of the cache"):
        read_small_cache(root)


def test_a_link_inside_the_cache_is_followed(root: Path) -> None:
    whole = read_small_cache(root)
    path = next(iter(root.rglob("scores/*.parquet")))
    path.rename(root / "moved")
    path.symlink_to(root / "moved")
    assert read_small_cache(root) == whole


def test_a_cache_may_itself_be_reached_by_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert read_small_cache(tmp_path / "link") == read_small_cache(root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize(
    "pattern", ["format.json", "reference.json", "manifest.json", "scores/*.parquet", "train/*.parquet"]
)
def test_a_pipe_is_not_waited_for(root: Path, pattern: str) -> None:
    path = next(iter(root.rglob(pattern)))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptShardError, match="expected a file, found a pipe"):
        read_small_cache(root)


def test_nothing_in_the_store_unpickles_or_evaluates() -> None:
    source = "".join(path.read_text() for path in Path(parquet.__file__).parent.glob("*.py"))
    assert not any(
        word in source
        for word in ("import pickle", "eval(", "exec(", "allow_pickle=True", "marshal", "shelve")
    )
