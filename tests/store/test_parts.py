import errno
import os
from pathlib import Path

import pytest

from dpo_cache.errors import StorageError
from dpo_cache.store import Cache, open_cache
from dpo_cache.store import parts as parts_module
from dpo_cache.store.folders.folder import open_folder
from dpo_cache.store.parts import KeptParts, has_part, holds_part
from tests.store.caches import make_cache
from tests.store.conftest import flip_file
from tests.store.refusing_disk import refuse

PLACE = "pairs/demo/train"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "cache")


def the_part(cache: Cache) -> tuple[dict, Path]:
    (part,) = cache.pairs("demo").manifest["parts"]
    return part, Path(str(cache)) / PLACE / part["file"]


def link_elsewhere(path: Path) -> None:
    path.rename(path.parents[4] / "elsewhere")
    path.symlink_to(path.parents[4] / "elsewhere")


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILED = {
    "gone": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "pipe": make_pipe,
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "link out of the cache": link_elsewhere,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_not_the_part_does_not_count_as_it(cache: Cache, spoil) -> None:
    part, path = the_part(cache)
    assert has_part(cache.folder, PLACE, part) and holds_part(cache.folder, PLACE, part)
    spoil(path)
    assert not has_part(cache.folder, PLACE, part) and not holds_part(cache.folder, PLACE, part)
    assert not cache.pairs("demo").has_parts() and not cache.pairs("demo").is_complete()


def test_other_bytes_of_the_same_number_are_found_on_a_disk(cache: Cache) -> None:
    part, path = the_part(cache)
    flip_file(path, 300)
    assert has_part(cache.folder, PLACE, part) and not holds_part(cache.folder, PLACE, part)


def test_a_part_that_this_user_may_not_read_is_not_held(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, path = the_part(cache)
    refuse(monkeypatch, errno.EACCES, lambda file: file == path)
    folder = open_folder(str(cache))
    assert has_part(folder, PLACE, part) and not holds_part(folder, PLACE, part)


def test_a_disk_that_fails_has_not_said_that_a_part_is_missing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, path = the_part(cache)
    refuse(monkeypatch, errno.EIO, lambda file: file == path)
    with pytest.raises(StorageError, match="Input/output error"):
        holds_part(open_folder(str(cache)), PLACE, part)


def test_a_remote_part_is_not_fetched_for_it(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    part, path = the_part(cache)
    folder = open_folder("memory://parts-test")
    folder.publish(f"{PLACE}/{part['file']}", path.read_bytes())
    monkeypatch.setattr(folder, "open_parquet", lambda name: pytest.fail("it was fetched"))
    assert holds_part(folder, PLACE, part)
    folder.remove(f"{PLACE}/{part['file']}")
    assert not holds_part(folder, PLACE, part)


@pytest.mark.parametrize("kept_bytes", [1, 2**20], ids=["in a file", "in memory"])
def test_kept_parts_are_read_back_in_any_order(monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    monkeypatch.setattr(parts_module, "KEPT_BYTES", kept_bytes)
    kept = KeptParts()
    for name, content in (("a", b"one"), ("b", b""), ("c", b"three" * 100)):
        kept.add(name, content)
    assert [kept.read(name) for name in "cab"] == [b"three" * 100, b"one", b""]
    kept.add("d", b"later")
    assert (kept.read("d"), kept.read("a"), "e" in kept) == (b"later", b"one", False)
    kept.close()
    kept.add("f", b"late")
    assert "a" not in kept and "f" not in kept


def test_nothing_is_kept_where_no_temporary_file_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "KEPT_BYTES", 1)
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    kept = KeptParts()
    kept.add("a", b"more than fits")
    assert "a" not in kept


def test_an_open_cache_sees_parts_of_another_size_only_as_missing(cache: Cache) -> None:
    """A writer that finds a cut leftover writes the part again."""
    _, path = the_part(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    writer = open_cache(str(cache)).write_pairs("demo", "train")
    writer.add(list(make_cache(path.parents[4] / "other").pairs("demo")))
    manifest = cache.pairs("demo").manifest
    writer.finish({name: value for name, value in manifest.items() if name not in ("parts", "num_pairs")})
    assert path.read_bytes() == whole and cache.pairs("demo").is_complete()
