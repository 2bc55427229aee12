"""Promise 7: a full disk, a read-only folder, a permission denied, a mount that vanishes: one clear error,
all that was published intact.
"""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import CacheError, NotInCacheError, StorageError
from dpo_cache.precomputing import units
from dpo_cache.store.folders import local
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.folders.local import LocalFolder
from tests.promises.life import live, publish_pairs, read_back
from tests.promises.refusals import Refusal, TroubledDisk, Unmounting
from tests.promises.soundness import faults, scratch
from tests.rotation import today
from tests.store.conftest import make_pairs

pytestmark = pytest.mark.usefixtures("small_parts")

REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
    errno.ENOTCONN,
)


class WatchedFolder(LocalFolder):
    """Remembers what was published, as far as `publish` has returned."""

    def __init__(self, root: Path, disk: Disk):
        super().__init__(root, disk)
        self.published: dict[str, bytes] = {}
        self.in_doubt: set[str] = set()  # was being replaced or removed

    def publish(self, name: str, content: bytes) -> None:
        self.in_doubt.add(name)
        super().publish(name, content)
        self.in_doubt.discard(name)
        self.published[name] = content

    def remove(self, name: str) -> None:
        self.published.pop(name, None)
        super().remove(name)

    def lost(self, root: Path) -> list[str]:
        """What was published and is not there, byte for byte, below the root."""
        certain = {name: content for name, content in self.published.items() if name not in self.in_doubt}
        return [
            name
            for name, content in certain.items()
            if not (root / name).exists() or (root / name).read_bytes() != content
        ]


def nothing(number: int, step: str, arguments: tuple) -> None:
    pass


def live_and_read(folder: LocalFolder) -> None:
    live(folder)
    read_back(folder)


@pytest.fixture
def num_steps(tmp_path: Path) -> int:
    disk = TroubledDisk(nothing)
    live_and_read(LocalFolder(tmp_path / "whole", disk))
    shutil.rmtree(tmp_path / "whole")
    return disk.num_steps


def may_pass(step: str, arguments: tuple, number: int, root: Path) -> bool:
    """Whether this refusal may go by without an error: it is answered by trying again, or nothing depends on
    the step.
    """
    is_part = "/pairs/" in str(arguments[0]) and str(arguments[0]).endswith(".parquet")
    is_above = step == "sync_folder" and not Path(arguments[0]).is_relative_to(root)
    return (
        step == "remove_folder"
        or number == errno.ENOENT
        # a part that may not be read is written again
        or (step in ("status", "open", "read on") and is_part and number in (errno.EACCES, errno.EPERM))
        or (is_above and number in (errno.EACCES, errno.EPERM))
    )


def meet_refusal(root: Path, at: int, number: int, *, forever: bool) -> None:
    """Live until the step is refused; check the error and what is left; live again on a disk that works."""
    refusal = Refusal(at, number, forever=forever)
    folder = WatchedFolder(root, TroubledDisk(refusal))
    caught: CacheError | None = None
    try:
        live_and_read(folder)
    except StorageError as error:
        caught = error
        lines = str(error).split("\n")
        assert len(lines) == 2 and lines[0].startswith("cannot ") and lines[1]
    except NotInCacheError as error:  # files that are suddenly not there
        assert number == errno.ENOENT
        caught = error
    assert refusal.refused
    assert caught or may_pass(*refusal.refused[0], number, root)
    assert faults(root) == [] and folder.lost(root) == []
    assert forever or scratch(root) == []
    live_and_read(LocalFolder(root, TroubledDisk(nothing)))
    assert dpo_cache.open_cache(root).pair_sets() == ["pairs/train"]
    shutil.rmtree(root)


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
def test_7_a_step_that_is_refused_is_one_clear_error_and_nothing_published_is_lost(
    tmp_path: Path, num_steps: int, forever: bool
) -> None:
    """Every eighth step, others each day, with the refusals in turn; the next test takes every refusal at each
    step.
    """
    for turn, at in enumerate(range(1 + (today() + 2 * forever) % 8, num_steps + 1, 8)):
        meet_refusal(tmp_path / "cache", at, REFUSALS[turn % len(REFUSALS)], forever=forever)


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", REFUSALS, ids=[errno.errorcode[number] for number in REFUSALS])
def test_7_every_refusal_at_every_step(tmp_path: Path, num_steps: int, number: int, forever: bool) -> None:
    for at in range(1, num_steps + 1):
        meet_refusal(tmp_path / "cache", at, number, forever=forever)


def test_7_a_cache_whose_mount_vanishes_is_not_begun_anew_on_the_disk_below(
    tmp_path: Path, num_steps: int
) -> None:
    root, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    num_met = 0
    tried = range(1, num_steps + 1, 4)
    for at in tried:
        root.mkdir()
        folder = WatchedFolder(root, TroubledDisk(Unmounting(at, root, elsewhere)))
        had_begun = False
        try:
            live_and_read(folder)
        except CacheError:
            had_begun = "format.json" in folder.published
        if had_begun:
            num_met += 1
            # at most the file that was being written
            assert len(LocalFolder(root).files()) <= 1 and not (root / "format.json").exists()
            assert faults(elsewhere) == [] and folder.lost(elsewhere) == []
        shutil.rmtree(root)
        shutil.rmtree(elsewhere, ignore_errors=True)  # the last steps may not be reached
    assert num_met > len(tried) // 2


def test_7_a_vanished_mount_is_said_so(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "cache")
    live(folder)
    folder.root.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError) as caught:
        folder.publish("references/r/scores/a.parquet", b"scores")
    assert str(caught.value) == (
        f"cannot write {folder}/references/r/scores/a.parquet: {folder} was a cache a moment ago and has "
        "no format.json now.\n"
        "If its disk was unmounted, mount it again and run the same command again; what was published is "
        "kept there."
    )
    assert not folder.root.exists()


def test_7_a_disk_that_does_not_answer_has_not_said_that_the_cache_is_missing(tmp_path: Path) -> None:
    for number in (errno.EIO, errno.ESTALE, errno.EACCES):
        with pytest.raises(StorageError, match=f"cannot look for .*format.json: {os.strerror(number)}"):
            LocalFolder(tmp_path, TroubledDisk(Refusal(1, number))).exists("format.json")


def test_7_a_disk_that_fails_under_a_reader_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    live(LocalFolder(tmp_path / "cache"))
    kinds = set()
    for at in range(1, 200):
        refusal = Refusal(at, errno.EIO)
        disk = TroubledDisk(refusal)
        try:
            read_back(LocalFolder(tmp_path / "cache", disk))
        except StorageError as error:
            assert "Input/output error" in str(error)
        if not refusal.refused:
            break
        kinds.add(refusal.refused[0][0])
    assert {"open", "read", "read on", "names"} <= kinds


# -- precompute on such a disk -----------------------------------------------------------------------------


def test_7_precompute_on_a_disk_that_fills_up_keeps_what_it_published(
    model_folder: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "FLUSH_S", 0.0)
    num_writes = 0

    def fill_up(number: int, step: str, arguments: tuple) -> None:
        nonlocal num_writes
        num_writes += step == "write"
        if step == "write" and num_writes > 4:  # format, reference, two shards
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local, "Disk", partial(TroubledDisk, fill_up))
    with pytest.raises(
        StorageError,
        match="No space left on device.\nThe disk is full: free some space and run the same command again",
    ):
        dpo_cache.precompute(model_folder, data_file, tmp_path / "cache", budget_tokens="24")
    monkeypatch.undo()
    assert faults(tmp_path / "cache") == [] and scratch(tmp_path / "cache") == []
    cache = dpo_cache.open_cache(tmp_path / "cache")
    kept = len(cache.scores(cache.references()[0]))
    report = dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    assert kept > 0 and report.already_cached == kept and report.scored_now == 20 - kept


# -- real refusals -----------------------------------------------------------------------------------------

SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from dpo_cache.errors import StorageError
from dpo_cache.store.folders.local import LocalFolder
from tests.promises.soundness import scratch
place = Path(sys.argv[1])

def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)

def refused(act, *arguments):
    try:
        act(*arguments)
    except StorageError as error:
        return str(error)
    raise SystemExit("nothing was refused")

mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place))
folder = LocalFolder(place / "cache")
folder.publish("format.json", b"{}")
folder.publish("kept", b"k" * 100_000)
message = refused(folder.publish, "big", b"b" * 2_000_000)
assert "No space left on device.\\nThe disk is full" in message, message
assert folder.files() == {"format.json": 2, "kept": 100_000} and scratch(folder.root) == []
folder.publish("small", b"s")  # there is room again
mount("-o", "remount,ro", str(place))
message = refused(folder.publish, "late", b"l")
assert "Read-only file system.\\nThe file system is read-only" in message, message
assert refused(folder.remove, "kept").startswith("cannot remove ")
assert folder.read("kept") == b"k" * 100_000
subprocess.run(["umount", "-l", str(place)], check=True)
message = refused(folder.publish, "later", b"l")
assert "has no format.json now.\\nIf its disk was unmounted" in message, message
assert os.listdir(place) == []
print("all refused")
"""


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    return (
        bool(unshare)
        and subprocess.run(
            [unshare, "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here")
def test_7_a_real_disk_that_is_full_then_read_only_then_unmounted(tmp_path: Path) -> None:
    command = ["unshare", "-rm", sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "all refused\n", done.stderr


FILE_SIZE_LIMIT = """
import resource, sys
from pathlib import Path
from dpo_cache.errors import StorageError
from dpo_cache.store.folders.local import LocalFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = LocalFolder(Path(sys.argv[1]))
folder.publish("small", b"s")
try:
    folder.publish("big", b"b" * 2000)
except StorageError as error:
    print(error, list(folder.root.iterdir()) == [folder.root / "small"], sep="\\n")
"""


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_7_a_file_size_limit_is_told_with_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILE_SIZE_LIMIT, str(tmp_path)], capture_output=True, text=True
    )
    assert re.fullmatch(
        r"cannot write .*/big: File too large\.\n.*raise the limit \(`ulimit -f`\).*\nTrue\n", done.stdout
    ), done


# -- shared folders, and what killed writers leave ----------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="no umask there")
@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"),
    [(0o002, 0o664, 0o775), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)],
)
def test_7_files_and_folders_have_what_the_umask_leaves(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(umask)
    try:
        live(LocalFolder(tmp_path / "cache"))
    finally:
        os.umask(before)
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode)


def test_7_a_path_that_is_too_long_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match="File name too long.\nThe file system has no room for a path this long"
    ):
        LocalFolder(tmp_path / "cache").publish(f"pairs/{'x' * 300}/a", b"x")
    longest = "y" * 255  # what is written first must not need a longer name than the file itself
    LocalFolder(tmp_path / "cache").publish(longest, b"x")


def test_7_a_folder_that_is_removed_as_empty_in_the_same_moment_is_made_again(tmp_path: Path) -> None:
    """As when another process tidies up between the making of the folder and the first file in it."""
    num_removed = 0

    def tidy(number: int, step: str, arguments: tuple) -> None:
        nonlocal num_removed
        if step == "create" and num_removed < 3:
            arguments[0].parent.rmdir()
            num_removed += 1

    folder = LocalFolder(tmp_path / "cache", TroubledDisk(tidy))
    folder.publish("references/r/a", b"x")
    assert num_removed == 3 and folder.files() == {"references/r/a": 1}


def test_7_a_pair_set_cannot_be_read_half(tmp_path: Path) -> None:
    """A part that is gone is a clear error, whether it is opened or held."""
    folder = LocalFolder(tmp_path / "cache")
    cache = dpo_cache.open_cache(folder.root, create=True)
    publish_pairs(cache, "pairs", make_pairs(5))
    folder.remove(f"pairs/pairs/train/{cache.pairs('pairs').manifest['parts'][1]['file']}")
    acts: list[Callable[[], object]] = [lambda: list(cache.pairs("pairs")), cache.pairs("pairs").keep_open]
    for act in acts:
        with pytest.raises(
            StorageError,
            match="cannot read .*: No such file or directory.\nIt is gone, or its disk was unmounted",
        ):
            act()
