"""Parts of a remote cache: how much of them is requested, and how often."""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpo_cache.errors import CorruptShardError, MissingFileError, OptionError, StorageError
from dpo_cache.store import open_cache
from dpo_cache.store.folders import ranges, remote_parts
from dpo_cache.store.folders.folder import open_folder
from dpo_cache.store.format.parquet import name_by_content
from dpo_cache.store.upkeep.contents import read_contents
from dpo_cache.types import Score
from tests.store.conftest import flip, key, make_pairs, make_scores, plain
from tests.store.object_store import Proxy

CACHE = "s3://bucket/cache"
IDENTITY = {"weights": "0" * 64}
DETAILS = {"name": "pairs", "split": "train", "pairs_digest": "d" * 64, "source": {}, "tokenization": {}}
SHARDS = 4
# another process, which has as many files open as it may when it needs a new connection
FEW_FILES = """
import os, resource, sys
from dpo_cache.errors import StorageError
from dpo_cache.store import open_cache
cache = open_cache("s3://bucket/cache")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    CALL
except StorageError as error:
    print(error)
"""


@pytest.fixture
def reference(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache of some shards, which are larger than a footer's request, and a pair set of three parts."""
    monkeypatch.setattr(ranges, "GAP_BYTES", 64)
    monkeypatch.setattr("dpo_cache.store.pairs.PART_PAIRS", 2)
    cache = open_cache(CACHE, create=True)
    reference = cache.publish_reference(IDENTITY, {"model": "tiny"})
    index = cache.scores(reference)
    for number in range(SHARDS):
        index.publish([large_score(2 * number), large_score(2 * number + 1)])
    writer = cache.write_pairs("pairs", "train")
    writer.add(make_pairs(6))
    writer.finish({**DETAILS, "reference": reference})
    forget(s3, monkeypatch)
    return reference


def large_score(number: int) -> tuple[bytes, Score]:
    return key(number), Score(-np.random.default_rng(number).random(20_000, np.float32))


def forget(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be another process on another machine, from now on."""
    s3.seen.clear()
    monkeypatch.setattr("dpo_cache.store.folders.remote._own_changes", {})
    monkeypatch.setenv("DPO_CACHE_PARTS", tempfile.mkdtemp(dir=os.environ["DPO_CACHE_PARTS"]))


def copies() -> list[Path]:
    return list(Path(os.environ["DPO_CACHE_PARTS"]).iterdir())


def requests(s3: Proxy) -> Counter[str]:
    """The requests by method, and those for Parquet files apart."""
    return Counter(
        request.split()[0] + (" parquet" if ".parquet" in request and "list-type" not in request else "")
        for request in s3.seen
    )


def test_ls_reads_one_range_of_each_file(s3: Proxy, reference: str) -> None:
    contents = read_contents(CACHE)
    assert (contents.references[0].completions, contents.references[0].tokens) == (
        2 * SHARDS,
        40_000 * SHARDS,
    )
    assert [entry.rows for entry in contents.pair_sets] == [6] and not contents.pair_sets[0].damage
    assert requests(s3) == {"GET parquet": SHARDS + 3, "GET": 4, "HEAD": 5}
    assert s3.count("GET", "list-type") == 1 and copies() == []


def test_opening_an_index_reads_footers_and_keys(s3: Proxy, reference: str) -> None:
    index = open_cache(CACHE).scores(reference)
    assert (
        len(index) == 2 * SHARDS and index.contains([key(number) for number in range(30)]).sum() == 2 * SHARDS
    )
    assert requests(s3) == {"GET parquet": 2 * SHARDS, "GET": 2, "HEAD": 2}
    assert copies() == []


@pytest.mark.rotating(3)
@pytest.mark.parametrize("limit_gb", ["0", "0.0003", "20"])
def test_values_are_downloaded_once_whatever_the_limit(
    s3: Proxy, reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit_gb: str
) -> None:
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", limit_gb)
    if limit_gb == "0":  # each is a temporary file, instead of bytes in memory
        monkeypatch.setattr(remote_parts, "MEMORY_BYTES", 1000)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    index = open_cache(CACHE).scores(reference)
    s3.seen.clear()
    for number in range(2 * SHARDS):
        (score,) = index.fetch([key(number)])
        assert (score.token_logps == large_score(number)[1].token_logps).all()
        assert sum(path.stat().st_size for path in copies()) <= float(limit_gb) * 1e9
        assert not any(tmp_path.iterdir())
    assert requests(s3) == {"GET parquet": SHARDS}
    if limit_gb == "0":  # looked up again, a shard is read by ranges
        s3.seen.clear()
        index.fetch([key(0)])
        assert requests(s3) == {"GET parquet": 1}


def test_small_files_are_requested_once_for_all(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", "0")
    index = open_cache(CACHE, create=True).scores("r" * 64)
    for number in range(0, 20, 2):
        index.publish(make_scores([number, number + 1]))
    forget(s3, monkeypatch)
    open_cache(CACHE, create=True)
    index = open_cache(CACHE, create=True).scores("r" * 64)
    index.fetch([key(number) for number in range(20)])
    assert requests(s3)["GET parquet"] == 10 and requests(s3)["HEAD parquet"] == 0


def test_a_pair_set_that_has_no_room_is_read_all_the_same(
    s3: Proxy, reference: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [plain(pair) for pair in open_cache(CACHE).pairs("pairs")]
    forget(s3, monkeypatch)
    limit = max(part["bytes"] for part in open_cache(CACHE).pairs("pairs").manifest["parts"])
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", str(limit / 1e9))  # of one part
    pairs = open_cache(CACHE).pairs("pairs")
    with caplog.at_level(logging.WARNING, "dpo_cache"):
        pairs.keep_open()
    assert "there is no room for local copies of 2 of 3 files" in caplog.text
    for _ in range(2):
        assert [plain(pair) for pair in pairs] == whole
        assert sum(path.stat().st_size for path in copies()) <= limit


def test_a_part_that_is_gone_is_noticed_when_it_should_be_kept_open(
    s3: Proxy, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", "0")
    cache = open_cache(CACHE)
    pairs = cache.pairs("pairs")
    cache.folder.remove(f"pairs/pairs/train/{pairs.manifest['parts'][1]['file']}")
    with pytest.raises(MissingFileError):
        pairs.keep_open()


@pytest.mark.parametrize("limit_gb", ["0", "20"])
def test_damage_is_found_without_a_copy_too(
    s3: Proxy, reference: str, monkeypatch: pytest.MonkeyPatch, limit_gb: str
) -> None:
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", limit_gb)
    folder = open_folder(CACHE)
    content = b"x" * 9000
    name = f"references/{reference}/scores/{name_by_content(content)}"
    folder.filesystem.pipe_file(f"bucket/cache/{name}", flip(content, 17))
    s3.seen.clear()
    with pytest.raises(CorruptShardError, match="do not hash to its name"):
        folder.open_parquet(name)
    assert s3.count("GET", name) == 2 and copies() == []


def test_what_changed_since_it_was_listed_is_read_as_it_is(s3: Proxy, reference: str) -> None:
    """A damaged file, repaired meanwhile by another process, which made it longer."""
    folder = open_folder(CACHE)
    content = b"x" * 9000
    name = f"scores/{name_by_content(content)}"
    folder.filesystem.pipe_file(f"bucket/cache/{name}", content[:500])
    assert len(folder.names("scores")) == 1
    folder.filesystem.pipe_file(f"bucket/cache/{name}", content)
    assert folder.open_parquet(name).read() == content


def test_what_this_process_repaired_is_read_as_it_is(s3: Proxy, reference: str) -> None:
    folder = open_folder(CACHE)
    content = b"x" * 9000
    name = f"scores/{name_by_content(content)}"
    folder.filesystem.pipe_file(f"bucket/cache/{name}", content[:500])
    folder.names("scores")
    folder.open_ranges(name).close()
    folder.publish(name, content)
    assert folder.open_ranges(name).read() == content


def test_a_copy_that_is_held_serves_keys_and_is_not_hashed_for_a_footer(s3: Proxy, reference: str) -> None:
    index = open_cache(CACHE).scores(reference)
    index.fetch([key(number) for number in range(2 * SHARDS)])
    assert len(copies()) == SHARDS
    s3.seen.clear()
    open_cache(CACHE).scores(reference)
    assert requests(s3)["GET parquet"] == 0
    read_contents(CACHE)
    assert requests(s3)["GET parquet"] == SHARDS + 3


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "call", ["cache.scores(sys.argv[1]).fetch([(0).to_bytes(16, 'big')])", "list(cache.pairs('pairs'))"]
)
def test_too_many_open_files_reads_as_that(s3: Proxy, reference: str, call: str) -> None:
    command = [sys.executable, "-c", FEW_FILES.replace("CALL", call), reference]
    done = subprocess.run(command, capture_output=True, text=True)
    assert re.fullmatch(
        r"cannot .*: Too many open files\.\nToo many files are open: raise the limit \(`ulimit -n`.*",
        done.stdout.strip(),
    ), done.stdout + done.stderr


# -- whether a cache can be written -------------------------------------------------------------------


def test_whether_a_store_can_be_written_is_tried_once_by_a_process(s3: Proxy) -> None:
    cache = open_cache(CACHE, create=True)
    s3.seen.clear()
    for _ in range(2):
        cache.check_writable()
    assert s3.count("PUT") == 1 and s3.count("DELETE") == 1
    assert cache.folder.files() == cache.folder.hidden() == {}
    assert open_cache(CACHE, create=True).folder.names("") == []


def test_a_store_that_only_lets_read_is_told_before_anything_is_written(s3: Proxy) -> None:
    from tests.store.object_store import Fault

    cache = open_cache(CACHE, create=True)
    s3.plan.append(Fault("error", "PUT", status=403, code="AccessDenied", times=99))
    with pytest.raises(
        StorageError, match=r"AccessDenied.*\n.*check that these credentials may list, read and write"
    ):
        cache.check_writable()


def test_a_store_that_lets_nothing_be_removed_can_be_written(s3: Proxy) -> None:
    from tests.store.object_store import Fault

    cache = open_cache(CACHE, create=True)
    s3.plan.append(Fault("error", "DELETE", status=403, code="AccessDenied", times=99))
    cache.check_writable()
    assert cache.folder.names("") == []


def test_a_kind_of_url_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    monkeypatch.setattr("dpo_cache.store.folders.remote._own_changes", {})
    with pytest.raises(
        StorageError, match="NotImplementedError.\nThis kind of URL can only be read: choose another"
    ):
        open_cache("memory://readonly", create=True).check_writable()


def test_an_s3_url_is_one_without_dots() -> None:
    with pytest.raises(OptionError, match="no '.' or '..' in it"):
        open_folder("s3://bucket/a/../b")
