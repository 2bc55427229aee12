"""Caches in an object store: a real S3 server over HTTP, behind a proxy that misbehaves by a plan."""

import logging
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_cache.errors import CorruptShardError, MissingFileError, OptionError, StorageError
from dpo_cache.store import open_cache
from dpo_cache.store.folders import remote
from dpo_cache.store.folders.folder import open_folder
from dpo_cache.store.format.parquet import name_by_content
from tests.store.conftest import flip, make_pairs, make_scores, plain
from tests.store.object_store import Fault, Proxy

CACHE = "s3://bucket/cache"
IDENTITY = {"weights": "0" * 64}
DETAILS = {"name": "pairs", "split": "train", "pairs_digest": "d" * 64, "source": {}, "tokenization": {}}

PASSING = [
    Fault("error", status=500, code="InternalError", times=2),
    Fault("error", status=503, code="SlowDown", times=3),
    Fault("error", status=429, code="TooManyRequests"),
    Fault("error", status=400, code="RequestTimeout"),
    Fault("reset", times=4),
    Fault("hang"),
]
LASTING = [
    (
        Fault("error", status=403, code="AccessDenied"),
        "AccessDenied",
        "check that these credentials may list, read and write there",
    ),
    (Fault("error", status=403, code="InvalidAccessKeyId"), "InvalidAccessKeyId", "Check the credentials"),
    (
        Fault("error", status=403, code="SignatureDoesNotMatch"),
        "SignatureDoesNotMatch",
        "Check the credentials",
    ),
    (Fault("error", status=400, code="ExpiredToken"), "ExpiredToken", "Check the credentials"),
    (
        Fault("error", status=400, code="AuthorizationHeaderMalformed"),
        "AuthorizationHeaderMalformed",
        "set AWS_DEFAULT_REGION",
    ),
]


def described(fault: Fault) -> str:
    return f"{fault.kind} {fault.code}" if fault.kind == "error" else fault.kind


def planned(fault: Fault, **changes: object) -> Fault:
    return Fault(**{**vars(fault), **changes})  # type: ignore[arg-type]


def connect_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the environment read again by the next folder that is opened: fsspec keeps file systems and their
    connections.
    """
    settings = {**remote._settings("s3"), "skip_instance_cache": True}
    monkeypatch.setattr(remote, "_settings", lambda _: settings)


def fill(location: str, numbers: range = range(12)) -> str:
    """A cache with one reference, a shard and a pair set of six pairs; returns the reference's id."""
    cache = open_cache(location, create=True)
    reference = cache.publish_reference(IDENTITY, {"model": "tiny"})
    cache.scores(reference).publish(make_scores(numbers))
    writer = cache.write_pairs("pairs", "train")
    writer.add(make_pairs(6))
    writer.finish({**DETAILS, "reference": reference})
    return reference


# -- what passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING, ids=described)
def test_a_read_outlives_what_passes(s3: Proxy, fault: Fault) -> None:
    folder = open_folder(CACHE)
    folder.publish("a.json", b"content")
    s3.plan.append(planned(fault, method="GET", where="a.json"))
    assert folder.read("a.json") == b"content"
    assert s3.hit[fault.kind] == fault.times


@pytest.mark.parametrize("fault", PASSING, ids=described)
def test_a_write_outlives_what_passes(s3: Proxy, fault: Fault) -> None:
    s3.plan.append(planned(fault, method="PUT"))
    folder = open_folder(CACHE)
    folder.publish("a.json", b"content")
    assert s3.hit[fault.kind] == fault.times
    assert folder.read("a.json") == b"content"


@pytest.mark.parametrize("fault", PASSING[:2] + PASSING[4:5], ids=described)
def test_listing_and_looking_outlive_what_passes(s3: Proxy, fault: Fault) -> None:
    folder = open_folder(CACHE)
    folder.publish("scores/a", b"content")
    for method, where in (("GET", "list-type"), ("HEAD", "scores")):
        s3.plan.append(planned(fault, method=method, where=where, times=fault.times))
    assert folder.names("scores") == ["a"]
    assert folder.exists("scores/a")
    assert folder.files() == {"scores/a": 7}
    assert s3.hit[fault.kind] == 2 * fault.times


def test_a_body_that_breaks_off_is_fetched_again(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.store.folders.remote.CHUNK_BYTES", 1000)
    content = np.random.default_rng(0).bytes(4500)
    name = name_by_content(content)
    folder = open_folder(CACHE)
    folder.publish(f"scores/{name}", content)
    folder.publish("a.json", content)
    s3.plan[:] = [Fault("cut", "GET", name, times=3), Fault("cut", "GET", "a.json")]
    s3.seen.clear()
    with folder.open_parquet(f"scores/{name}") as file:
        assert file.read() == content
    assert folder.read("a.json") == content
    assert s3.hit["cut"] == 4
    assert s3.count("GET", name) == 5 + 3, "a break costs one range, not the file"


def test_a_range_that_comes_short_is_fetched_again(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a store that ends a body early without an error."""
    content = b"x" * 3000
    name = f"scores/{name_by_content(content)}"
    folder = open_folder(CACHE)
    folder.publish(name, content)
    fetch, shortened = folder.filesystem.cat_file, iter([10, 100, 1000])
    monkeypatch.setattr(
        folder.filesystem,
        "cat_file",
        lambda *place, **options: fetch(*place, **options)[: next(shortened, None)],
    )
    assert folder.read(name) == content


def test_a_put_that_is_never_asked_for_its_body_is_tried_again(
    s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CALL_S", 0.5)
    s3.plan.append(Fault("mute"))
    folder = open_folder(CACHE)
    folder.publish("a.json", b"content")
    assert s3.hit["mute"] == 1
    assert folder.read("a.json") == b"content"


def test_what_does_not_pass_ends_with_what_was_tried(
    s3: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.store.folders.retries.REMARK_AFTER_S", 0.01)
    folder = open_folder(CACHE)
    folder.publish("a.json", b"content")
    s3.plan.append(Fault("error", "GET", "a.json", times=99, status=503, code="SlowDown"))
    with caplog.at_level(logging.WARNING, "dpo_cache"), pytest.raises(StorageError) as caught:
        folder.read("a.json")
    assert s3.hit["error"] == 7
    assert str(caught.value).startswith(f"cannot read {CACHE}/a.json: SlowDown: injected.\nTried 7 times in ")
    assert "run the same command again; what was published is kept." in str(caught.value)
    remarks = [record.message for record in caplog.records if record.name == "dpo_cache"]
    assert len(remarks) == 1
    assert remarks[0].startswith(f"cannot read {CACHE}/a.json so far (SlowDown: injected; tried ")


def test_a_store_that_is_not_there_is_told(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    connect_anew(monkeypatch)
    with pytest.raises(
        StorageError,
        match="Could not connect to the endpoint.*\nTried 7 times in .*check the network and the endpoint",
    ):
        open_folder(CACHE).exists("format.json")


# -- what stays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "code", "advice"), LASTING, ids=[fault.code for fault, _, _ in LASTING])
def test_what_stays_is_told_at_once(s3: Proxy, fault: Fault, code: str, advice: str) -> None:
    folder = open_folder(CACHE)
    for method, call in (
        ("GET", lambda: folder.read("a.json")),
        ("PUT", lambda: folder.publish("a.json", b"x")),
    ):
        s3.reset()
        s3.plan.append(planned(fault, method=method, times=99))
        with pytest.raises(
            StorageError, match=rf"^cannot (read|write) {CACHE}/a.json: {code}: injected.\n.*{advice}"
        ):
            call()
        assert s3.hit["error"] == 1


def test_a_missing_bucket_is_told_before_anything_is_scored(s3: Proxy) -> None:
    with pytest.raises(StorageError, match="NoSuchBucket.*\nThere is no such bucket"):
        open_cache("s3://nowhere/cache", create=True)
    with pytest.raises(StorageError, match="NoSuchBucket.*\nThere is no such bucket"):
        open_folder("s3://nowhere").names("")


def test_missing_credentials_are_told(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    connect_anew(monkeypatch)
    with pytest.raises(
        StorageError, match="^cannot look for .*credentials.*\nCheck the credentials of the store"
    ):
        open_folder(CACHE).exists("format.json")


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/cache", "s3fs"), ("gs://bucket/cache", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)  # type: ignore[attr-defined]
    with pytest.raises(
        StorageError,
        match=rf"^{url}: the package for this kind of URL is missing \(.*\).\nRun `pip install {package}`.$",
    ):
        open_folder(url)


def test_the_hub_offline_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.store.folders.retries.time.sleep", pytest.fail)  # nothing is tried again
    folder = open_folder("hf://datasets/someone/cache/sub/")
    assert str(folder) == "hf://datasets/someone/cache/sub"
    assert folder.root == "datasets/someone/cache/sub"
    with pytest.raises(
        StorageError,
        match="^cannot look for hf://datasets/someone/cache/sub/format.json: .*\nHF_HUB_OFFLINE is set",
    ):
        folder.exists("format.json")


# -- URLs and names -----------------------------------------------------------------------------------


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/", "s3://bucket/a cache//", "s3a://bucket/x/y/", "s3://bucket/ä%20+"]
)
def test_every_spelling_of_a_url_holds_a_cache(s3: Proxy, url: str) -> None:
    fill(url)
    cache = open_cache(url)
    assert str(cache) == url.rstrip("/")
    assert [plain(pair) for pair in cache.pairs("pairs")] == [plain(pair) for pair in make_pairs(6)]
    assert "format.json" in cache.folder.files()


@pytest.mark.parametrize(
    ("url", "problem"),
    [("s3://", "names no bucket"), ("hf://", "names no repository"), ("s3://bucket/a?version=1", "no query")],
)
def test_a_url_that_cannot_be_a_folder_is_refused(url: str, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        open_folder(url)


def test_listed_names_never_leave_the_root(s3: Proxy) -> None:
    import boto3

    client = boto3.client("s3")
    for key in (
        "cache/../up",
        "cache//empty",
        "cache/a/../../up",
        "cache/a\\b",
        "cache/c:d",
        "cache/.hidden",
        "cache-beside/x",
        "cache/",
        "cache/good/x",
    ):
        client.put_object(Bucket="bucket", Key=key, Body=b"x")
    folder = open_folder(CACHE)
    assert folder.names("") == ["a", "good"]
    assert folder.files() == {"good/x": 1}
    assert folder.hidden() == {".hidden": 1}


def test_the_time_of_a_file_is_the_stores(s3: Proxy) -> None:
    import boto3

    folder = open_folder(CACHE)
    folder.publish("a", b"x")
    head = boto3.client("s3").head_object(Bucket="bucket", Key="cache/a")
    assert folder.modified("a") == head["LastModified"].timestamp()
    assert folder.modified("b") is None and folder.links() == []


# -- late listings ------------------------------------------------------------------------------------


def test_what_is_named_is_found_though_no_listing_has_it(s3: Proxy) -> None:
    reference = fill(CACHE)
    s3.plan.append(Fault("late", "GET", "list-type", times=999, hidden="cache/"))
    other_process = {}  # another process has no memory of what this one published
    cache = open_cache(CACHE)
    cache.folder._own = other_process  # type: ignore[union-attr]
    assert cache.pair_sets() == [] and cache.references() == []
    assert len(cache.pairs("pairs/train")) == len(cache.pairs("pairs")) == 6
    assert cache.find_reference(reference) == reference
    assert cache.read_reference(reference)["identity"] == IDENTITY


def test_what_this_process_published_counts_as_listed(s3: Proxy) -> None:
    s3.plan.append(Fault("late", "GET", "list-type", times=999, hidden="cache/"))
    reference = fill(CACHE)
    cache = open_cache(CACHE)
    assert cache.pair_sets() == ["pairs/train"] and cache.references() == [reference]
    assert len(cache.scores(reference)) == 12
    assert len(cache.folder.files()) == 5


def test_what_this_process_removed_is_gone_though_listed(s3: Proxy) -> None:
    folder = open_folder(CACHE)
    folder.publish("scores/a", b"x")
    folder.publish("scores/b", b"x")
    folder.remove("scores/a")
    assert folder.names("scores") == ["b"]
    s3.plan.append(Fault("stale", "GET", "list-type", times=2, hidden="cache/scores/a"))
    assert folder.names("scores") == ["b"]
    assert folder.files() == {"scores/b": 1}
    assert s3.hit["stale"] == 2


def test_a_shard_that_is_compacted_away_after_it_was_listed(s3: Proxy) -> None:
    reference = fill(CACHE)
    cache = open_cache(CACHE)
    (shard,) = cache.folder.names(f"references/{reference}/scores")
    place = f"references/{reference}/scores"
    cache.scores(reference).publish(make_scores(range(20)))
    cache.folder.remove(f"{place}/{shard}")
    s3.plan.append(Fault("stale", "GET", "list-type", times=1, hidden=f"cache/{place}/{shard}"))
    another = open_cache(CACHE)
    another.folder._own = {}  # type: ignore[union-attr]
    assert len(another.scores(reference)) == 20
    assert s3.hit["stale"] == 1


def test_a_file_that_is_gone_is_an_error_of_its_own(s3: Proxy) -> None:
    with pytest.raises(MissingFileError, match=f"^cannot read {CACHE}/a.json: there is no such file."):
        open_folder(CACHE).read("a.json")
    with pytest.raises(MissingFileError):
        open_folder(CACHE).open_parquet(f"scores/{'0' * 64}.parquet")


# -- parts and PUTs -----------------------------------------------------------------------------------


def test_a_part_is_fetched_once_and_sent_once(s3: Proxy) -> None:
    content = b"x" * 3000
    name = f"scores/{name_by_content(content)}"
    folder = open_folder(CACHE)
    folder.publish(name, content)
    folder.publish(name, content)
    for _ in range(3):
        with open_folder(CACHE).open_parquet(name) as file:
            assert file.read() == content
    assert s3.count("PUT") == 1
    assert s3.count("GET", name) == 1


def test_a_large_file_is_one_put(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_S", 30)
    content = bytes(110 << 20)
    open_folder(CACHE).publish("large", content)
    assert s3.count("PUT") == 1 and s3.count("POST") == 0
    assert open_folder(CACHE).size("large") == len(content)


def test_a_file_damaged_in_the_store_is_told_and_not_kept(s3: Proxy, tmp_path: Path) -> None:
    content = b"x" * 3000
    name = f"scores/{name_by_content(content)}"
    folder = open_folder(CACHE)
    folder.filesystem.pipe_file(f"bucket/cache/{name}", flip(content, 17))
    with pytest.raises(CorruptShardError, match="do not hash to its name"):
        folder.open_parquet(name)
    assert not any(folder.parts._copies.folder.iterdir())
    assert folder.read(name) == flip(content, 17), (
        "what is read is what the store has, so that verify sees it"
    )


def test_a_put_that_arrives_cut_short_is_told(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(CACHE)
    send = folder.filesystem.pipe_file
    monkeypatch.setattr(
        folder.filesystem, "pipe_file", lambda path, content, **options: send(path, content[:-1], **options)
    )
    with pytest.raises(StorageError, match="7 bytes were sent, the store holds 6"):
        folder.publish("a.json", b"content")


def test_two_writers_leave_the_union(s3: Proxy) -> None:
    first, second = (open_cache(CACHE, create=True) for _ in range(2))
    reference = first.publish_reference(IDENTITY, {"model": "tiny"})
    assert second.publish_reference(IDENTITY, {"model": "tiny"}) == reference
    indexes = first.scores(reference), second.scores(reference)
    indexes[0].publish(make_scores(range(10)))
    indexes[1].publish(make_scores(range(5, 15)))
    indexes[0].refresh()
    assert len(indexes[0]) == len(open_cache(CACHE).scores(reference)) == 15
