"""Copies between a local cache and an object store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_cache.cli.app import app
from dpo_cache.errors import CacheError, CorruptShardError, NotInCacheError, OptionError, StorageError
from dpo_cache.options.upkeep import PullOptions, PushOptions
from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import digest_json
from dpo_cache.store.upkeep.copy import TransferProgress, copy_cache
from tests.store.conftest import flip_file, make_pairs, make_scores, plain
from tests.store.object_store import Fault, Proxy

REMOTE = "s3://bucket/cache"

WRITER = """
import sys
from dpo_cache.store import open_cache
from tests.store.conftest import make_scores
cache = open_cache("s3://bucket/cache", create=True)
reference = cache.publish_reference({"weights": "0"}, {})
index = cache.scores(reference)
for number in range(200):
    index.publish(make_scores(range(10 * number, 10 * number + 10)))
"""


def fill(location: str | Path, *, pairs: int = 5, references: int = 2, name: str = "pairs") -> list[str]:
    """References with two shards each, and a pair set under the first; returns the references' ids."""
    cache = open_cache(location, create=True)
    ids = [
        cache.publish_reference({"weights": str(number)}, {"model": "tiny"}) for number in range(references)
    ]
    for number, reference in enumerate(ids):
        for first in (0, 10):
            cache.scores(reference).publish(
                make_scores(range(100 * number + first, 100 * number + first + 10))
            )
    writer = cache.write_pairs(name, "train")
    for first in range(0, pairs, 2):
        writer.add(make_pairs(min(2, pairs - first), first))
        writer._write_part()
    writer.finish(
        {
            "name": name,
            "split": "train",
            "reference": ids[0],
            "pairs_digest": digest_json(pairs),
            "source": {},
            "tokenization": {},
        }
    )
    return ids


def contents(location: str | Path) -> dict[str, bytes]:
    folder = open_cache(location).folder
    return {name: folder.read(name) for name in folder.files()}


def copy(source: str | Path, target: str | Path, **options: object):
    return copy_cache(open_cache(source), open_cache(target, create=True), **options)  # type: ignore[arg-type]


def check_no_dangling(location: str) -> None:
    """Nothing that is visible points at what is not there."""
    cache = open_cache(location)
    for name in cache.pair_sets():
        pairs = cache.pairs(name)
        assert pairs.is_complete()
        cache.read_reference(pairs.reference_id)
    for file in cache.folder.files("references"):
        cache.read_reference(file.split("/")[1])


def test_push_and_pull_give_the_same_files(s3: Proxy, tmp_path: Path) -> None:
    fill(tmp_path / "here")
    pushed = copy(tmp_path / "here", REMOTE)
    pulled = copy(REMOTE, tmp_path / "there")
    before = contents(tmp_path / "here")
    assert contents(REMOTE) == contents(tmp_path / "there") == before
    assert pushed.files_sent == pulled.files_sent == len(before) == 11
    assert pushed.bytes_sent == sum(map(len, before.values()))
    assert pushed.pair_sets == ["pairs/train"]


def test_only_what_is_missing_is_sent(s3: Proxy, tmp_path: Path) -> None:
    first, _ = fill(tmp_path / "here")
    copy(tmp_path / "here", REMOTE)
    open_cache(tmp_path / "here").scores(first).publish(make_scores(range(500, 505)))
    s3.seen.clear()
    report = copy(tmp_path / "here", REMOTE)
    assert (report.files_sent, report.files_present) == (1, 11)
    assert s3.count("PUT") == 1
    assert copy(tmp_path / "here", REMOTE).files_sent == 0
    assert contents(REMOTE) == contents(tmp_path / "here")


def test_files_go_in_the_order_of_what_refers_to_what(s3: Proxy, tmp_path: Path) -> None:
    fill(tmp_path / "here")
    copy(tmp_path / "here", REMOTE)
    sent = [request.removeprefix("PUT /bucket/cache/") for request in s3.seen if request.startswith("PUT")]
    kinds = ["format.json", "reference.json", "/scores/", "pairs/", "manifest.json"]
    order = [max(index for index, kind in enumerate(kinds) if kind in name) for name in sent]
    assert order == sorted(order) and set(order) == {0, 1, 2, 3, 4}


@pytest.mark.rotating(3)
@pytest.mark.parametrize("puts", range(11))
def test_a_push_that_dies_anywhere_goes_on_where_it_was(s3: Proxy, tmp_path: Path, puts: int) -> None:
    fill(tmp_path / "here")
    s3.plan += [
        Fault("none", "PUT", times=puts),
        Fault("error", "PUT", times=99, status=403, code="AccessDenied"),
    ]
    with pytest.raises(StorageError, match="AccessDenied"):
        copy(tmp_path / "here", REMOTE)
    s3.plan.clear()
    if puts:
        check_no_dangling(REMOTE)
    report = copy(tmp_path / "here", REMOTE)
    assert report.files_sent == 11 - puts and report.files_present == puts
    assert contents(REMOTE) == contents(tmp_path / "here")


def test_a_copy_outlives_a_bad_network(s3: Proxy, tmp_path: Path) -> None:
    fill(tmp_path / "here")
    s3.plan += [
        Fault("reset", "PUT", "scores", times=2),
        Fault("error", "PUT", "pairs", times=3, status=503, code="SlowDown"),
    ]
    copy(tmp_path / "here", REMOTE)
    s3.plan[:] = [Fault("cut", "GET", ".parquet", times=3), Fault("error", "GET", "list-type", times=2)]
    copy(REMOTE, tmp_path / "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert s3.hit["cut"] == 3


def test_some_of_a_cache_can_be_copied(s3: Proxy, tmp_path: Path) -> None:
    first, second = fill(REMOTE)
    report = copy(REMOTE, tmp_path / "pairs", pairs=["pairs"])
    cache = open_cache(tmp_path / "pairs")
    assert [plain(pair) for pair in cache.pairs("pairs")] == [
        plain(pair) for pair in open_cache(REMOTE).pairs("pairs/train")
    ]
    assert cache.references() == [first] and not len(cache.scores(first))
    assert report.scored_references == []
    copy(REMOTE, tmp_path / "scores", references=[second[:8]])
    cache = open_cache(tmp_path / "scores")
    assert cache.references() == [second] and len(cache.scores(second)) == 20 and cache.pair_sets() == []
    copy(REMOTE, tmp_path / "pairs")
    assert contents(tmp_path / "pairs") == contents(REMOTE)


def test_what_is_not_there_cannot_be_copied(s3: Proxy, tmp_path: Path) -> None:
    fill(REMOTE)
    with pytest.raises(NotInCacheError, match="no pair set 'nothing'"):
        copy(REMOTE, tmp_path / "there", pairs=["nothing"])
    with pytest.raises(NotInCacheError, match="no reference whose id starts with 'zz'"):
        copy(REMOTE, tmp_path / "there", references=["zz"])
    assert not (tmp_path / "there").exists()


def test_a_pair_set_with_other_content_is_replaced_only_when_asked(s3: Proxy, tmp_path: Path) -> None:
    fill(tmp_path / "here", pairs=5)
    fill(REMOTE, pairs=3)
    s3.seen.clear()
    with pytest.raises(
        CacheError,
        match=r"^s3://bucket/cache: pairs/train is there already with other content.\nOverwrite it ",
    ):
        copy(tmp_path / "here", REMOTE)
    assert s3.count("PUT") == 0
    copy(tmp_path / "here", REMOTE, overwrite=True)
    assert len(open_cache(REMOTE).pairs("pairs")) == 5
    check_no_dangling(REMOTE)


def test_a_damaged_file_is_not_sent(s3: Proxy, tmp_path: Path) -> None:
    first, _ = fill(tmp_path / "here")
    shard = next((tmp_path / "here" / "references" / first / "scores").iterdir())
    flip_file(shard, 20)
    with pytest.raises(CorruptShardError, match=shard.name):
        copy(tmp_path / "here", REMOTE)
    assert shard.name not in " ".join(open_cache(REMOTE).folder.files())


def test_a_truncated_file_at_the_target_is_sent_again(s3: Proxy, tmp_path: Path) -> None:
    fill(tmp_path / "here")
    copy(tmp_path / "here", REMOTE)
    remote = open_cache(REMOTE).folder
    shard = next(name for name in remote.files() if "/scores/" in name)
    remote.filesystem.pipe_file(f"bucket/cache/{shard}", b"torn")
    assert copy(tmp_path / "here", REMOTE).files_sent == 1
    assert contents(REMOTE) == contents(tmp_path / "here")


def test_a_shard_that_is_compacted_while_it_is_pulled(s3: Proxy, tmp_path: Path) -> None:
    first, _ = fill(REMOTE)
    cache = open_cache(REMOTE)
    place = f"references/{first}/scores"
    old = cache.folder.names(place)
    cache.scores(first).publish(make_scores(range(20)))
    for name in old:
        cache.folder.remove(f"{place}/{name}")
    cache.folder._own.clear()  # type: ignore[union-attr]  # as another process would see it
    s3.plan.append(
        Fault(
            "stale",
            "GET",
            "list-type=2&prefix=cache%2Freferences%2F" + first,
            times=1,
            hidden=f"cache/{place}/{old[0]}",
        )
    )
    copy(REMOTE, tmp_path / "there")
    assert s3.hit["stale"] == 1
    assert contents(tmp_path / "there") == contents(REMOTE)


def test_progress_ends_at_the_whole(s3: Proxy, tmp_path: Path) -> None:
    fill(tmp_path / "here")
    seen: list[TransferProgress] = []
    report = copy(tmp_path / "here", REMOTE, on_progress=seen.append)
    last = seen[-1]
    assert (
        (last.num_files, last.num_bytes)
        == (last.total_files, last.total_bytes)
        == (report.files_sent, report.bytes_sent)
    )
    assert [entry.num_files for entry in seen] == list(range(1, 12))
    assert last.seconds_left == 0 and last.bytes_per_s > 0


def test_a_writer_killed_between_puts_leaves_whole_shards(s3: Proxy) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    deadline = time.monotonic() + 60
    while s3.count("PUT", "/scores/") < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    cache = open_cache(REMOTE)
    (reference,) = cache.references()
    shards = cache.folder.names(f"references/{reference}/scores")
    index = cache.scores(reference)
    assert 4 <= len(shards) < 200
    assert len(index) == 10 * len(shards)
    keys = [key for key, _ in make_scores(range(len(index)))]
    assert [score.logps for score in index.fetch(keys)] == [
        score.logps for _, score in make_scores(range(len(index)))
    ]


@pytest.mark.parametrize("options", [PullOptions, PushOptions])
def test_the_ends_are_a_url_and_a_folder(options: type) -> None:
    options(remote="s3://bucket/cache", local="file:///folder")
    with pytest.raises(OptionError, match="^LOCAL s3://b: expected a folder.\nThe order is"):
        options(remote="s3://a", local="s3://b")
    with pytest.raises(
        OptionError, match="^REMOTE /a: expected a URL .*\nBetween two folders use `dpo-cache merge`"
    ):
        options(remote="/a", local="/b")
    options(remote="file:///a", local="/b")  # such as a disk that several machines mount


def test_the_commands_say_what_was_copied_and_what_is_next(
    s3: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = fill(tmp_path / "here")
    app(["push", str(tmp_path / "here"), REMOTE], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/here -> {REMOTE}"
    assert lines[2].split() == [
        "references",
        *f"{', '.join(entry[:12] for entry in sorted([first, second]))}".split(),
    ]
    assert lines[3].split()[:3] == ["sent", "11", "files,"]
    assert lines[-2:] == [
        f"{REMOTE} holds the copy. Next, on another machine:",
        f"  dpo-cache pull {REMOTE} LOCAL",
    ]
    app(["pull", REMOTE, str(tmp_path / "there"), "--pairs", "pairs/train"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert "(without its scores)" in lines[2]
    assert lines[-1] == f"  dpo-cache train --cache {tmp_path}/there --pairs pairs/train --output RUN"
    app(["pull", REMOTE, str(tmp_path / "there"), "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report["files_sent"] + report["files_present"] == 11
