"""One process at a time in a folder, under one kernel and across machines, and after any death."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_cache.errors import TrainingError
from dpo_cache.files import claim as claim_module
from dpo_cache.files.claim import CLAIM, Claim, claimed
from tests.store.conftest import open_path  # noqa: F401  (a fixture)
from tests.store.other_user import as_other_user, needs_root


@contextmanager
def held(folder: Path, remarks: list[str] | None = None) -> Iterator[Claim]:
    log = (lambda _: None) if remarks is None else remarks.append
    with claimed(folder, TrainingError, "another process is training here", log) as claim:
        yield claim


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait, which takes no time."""
    found: list[float] = []
    monkeypatch.setattr(claim_module, "_wait", found.append)
    return found


def write_foreign(folder: Path, **fields: object) -> Path:
    """The claim of a process on another machine."""
    folder.mkdir(exist_ok=True)
    content = {"process": 7, "host": "node9", "kernel": "another", "token": "t", "beat": 3, **fields}
    (folder / CLAIM).write_text(json.dumps(content))
    return folder / CLAIM


def test_the_second_is_refused_while_the_first_lives_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with held(folder):
        with pytest.raises(TrainingError) as caught, held(folder):
            raise AssertionError("not reached")
        assert str(caught.value) == (
            f"{folder}: another process is training here (process {os.getpid()} on {os.uname().nodename}).\n"
            "Wait until it has ended, or stop it, or choose another `output`."
        )
    assert list(tmp_path.iterdir()) == []
    with held(folder):
        (folder / "config.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


HOLDER = """
import os, sys, time
from pathlib import Path
from dpo_cache.errors import TrainingError
from dpo_cache.files.claim import claimed
with claimed(Path(sys.argv[1]), TrainingError, "here", print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="no such locks there")
def test_the_claim_of_a_killed_process_ends_at_once(tmp_path: Path, waits: list[float]) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=f"process {process.pid} on "), held(tmp_path):
            raise AssertionError("not reached")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    assert (tmp_path / CLAIM).exists()
    remarks: list[str] = []
    with held(tmp_path, remarks) as claim:
        claim.check()
    assert not remarks and not waits and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_process_on_another_machine_is_alive_if_it_renews_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        without_locks(monkeypatch)
    path, waited = write_foreign(tmp_path / "run"), []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 5:
            write_foreign(tmp_path / "run", beat=4)

    monkeypatch.setattr(claim_module, "_wait", wait)
    remarks: list[str] = []
    with (
        pytest.raises(TrainingError, match=r"training here \(process 7 on node9\)"),
        held(tmp_path / "run", remarks),
    ):
        raise AssertionError("not reached")
    assert len(waited) == 5 and json.loads(path.read_text())["beat"] == 4
    assert remarks == [
        f"{tmp_path / 'run'}: claimed by process 7 on node9; waiting up to 60 s to see whether its process is alive."
    ]


@pytest.mark.parametrize("end", ["silent", "released", "torn"])
def test_the_claim_of_a_dead_process_on_another_machine_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    path, waited = write_foreign(tmp_path), []
    if end == "torn":
        path.write_text('{"process": 7, "ho')

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if end == "released":
            path.unlink(missing_ok=True)

    monkeypatch.setattr(claim_module, "_wait", wait)
    with held(tmp_path) as claim:
        claim.check()
        assert json.loads(path.read_text())["process"] == os.getpid()
        assert sum(waited) == (claim_module.SILENT_S if end == "silent" else 1)
    assert not path.exists()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(claim_module.fcntl, "flock", refuse)


def test_without_locks_the_beat_decides_between_processes_of_one_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    with held(tmp_path) as first:
        monkeypatch.setattr(claim_module, "_wait", lambda _: first.renew())
        with pytest.raises(TrainingError, match="another process is training here"), held(tmp_path):
            raise AssertionError("not reached")
        first.check()
        monkeypatch.setattr(claim_module, "_wait", lambda _: None)  # as if it had died
        with held(tmp_path) as second:
            assert second.descriptor is None
            first.renew()
            with pytest.raises(TrainingError, match="another process works here now(?s:.*)`resume`"):
                first.check()
            second.renew()
            second.check()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_lost_its_claim_leaves_the_others(tmp_path: Path) -> None:
    with held(tmp_path) as claim:
        write_foreign(tmp_path)
        claim.renew()
        with pytest.raises(TrainingError, match="this one stops"):
            claim.check()
    assert json.loads((tmp_path / CLAIM).read_text())["host"] == "node9"


def test_a_claim_that_is_removed_while_it_is_being_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its former holder removes the file between this process's opening and locking it."""
    real, num_locked = claim_module.fcntl.flock, 0

    def lock(descriptor: int, how: int) -> None:
        nonlocal num_locked
        num_locked += 1
        if num_locked == 1:
            (tmp_path / CLAIM).unlink()
        real(descriptor, how)

    monkeypatch.setattr(claim_module.fcntl, "flock", lock)
    with held(tmp_path):
        assert num_locked == 2 and (tmp_path / CLAIM).exists()
        with pytest.raises(TrainingError), held(tmp_path):
            raise AssertionError("not reached")


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(claim_module.os, "write", fail)
    with (
        pytest.raises(TrainingError, match=r"cannot write .*claim.tmp: No space left"),
        held(tmp_path / "run"),
    ):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


# -- other users -------------------------------------------------------------------------------------------


def take(folder: Path, wait_s: float) -> str:
    """Take the claim, and return whether its file names this process; or the error."""
    claim_module._wait = lambda _: time.sleep(wait_s)
    try:
        with held(folder):
            return str(json.loads((folder / CLAIM).read_text())["process"] == os.getpid())
    except TrainingError as error:
        return str(error)


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o600], ids=oct)
@pytest.mark.parametrize("kernel", ["another", claim_module.running_kernel()], ids=["another", "this"])
def test_the_claim_of_another_users_dead_process_ends(open_path: Path, mode: int, kernel: str) -> None:
    (open_path / "run").mkdir()
    (open_path / "run").chmod(0o777)
    path = write_foreign(open_path / "run", kernel=kernel)
    path.chmod(mode)
    assert as_other_user(lambda: take(open_path / "run", 0.0)) == "True"
    assert not path.exists()


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o600], ids=oct)
def test_the_claim_of_another_users_living_process_stays(
    open_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.setattr(claim_module, "BEAT_S", 0.01)  # of a file that cannot be read, its time shows beats
    (open_path / "run").mkdir()
    (open_path / "run").chmod(0o777)
    with held(open_path / "run") as claim:
        (open_path / "run" / CLAIM).chmod(mode)
        found = as_other_user(lambda: take(open_path / "run", 0.1))
        assert found.startswith(f"{open_path}/run: another process is training here")
        claim.check()


@needs_root
def test_users_who_write_a_folder_write_each_others_claims_though_none_may_be_removed(
    open_path: Path,
) -> None:
    folder = open_path / "run"
    folder.mkdir()
    folder.chmod(0o1777)
    with held(folder):
        path = Path(shutil.copy(folder / CLAIM, open_path / "kept"))
        mode = (folder / CLAIM).stat().st_mode
    path.rename(folder / CLAIM)  # as after a kill
    assert oct(mode & 0o777) == "0o666"
    (folder / CLAIM).chmod(mode)
    assert as_other_user(lambda: take(folder, 0.0)) == "True"
    (folder / CLAIM).chmod(0o644)
    (folder / CLAIM).write_text("")
    assert as_other_user(lambda: take(folder, 0.0)).splitlines() == [
        f"cannot write {folder / CLAIM}: Operation not permitted.",
        f"Check the path and its permissions. Its process has ended: let its owner remove {folder / CLAIM}.",
    ]


def test_a_claim_that_is_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / CLAIM).symlink_to(tmp_path / "gone")
    with pytest.raises(TrainingError, match=r"cannot write .*claim\.tmp: File exists"), held(tmp_path):
        raise AssertionError("not reached")
