"""One process of a machine at a time, for work that it does for the others."""

import multiprocessing
from pathlib import Path

import pytest

from dpo_cache.files.node_lock import node_lock


def _hold(
    name: str, started: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event"
) -> None:
    with node_lock(name):
        started.set()
        end.wait(60)


def _enter(name: str, entered: "multiprocessing.synchronize.Event") -> None:
    with node_lock(name):
        entered.set()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_others_wait_and_a_process_that_dies_holds_nothing(home: Path) -> None:
    context = multiprocessing.get_context("fork")
    started, end, entered, elsewhere = (context.Event() for _ in range(4))
    holder = context.Process(target=_hold, args=("hash", started, end))
    holder.start()
    assert started.wait(60)
    other = context.Process(target=_enter, args=("other name", elsewhere))
    other.start()
    assert elsewhere.wait(60), "another name is another lock"
    waiting = context.Process(target=_enter, args=("hash", entered))
    waiting.start()
    assert not entered.wait(0.3)
    holder.kill()
    assert entered.wait(60)
    for process in (holder, other, waiting):
        process.join(60)
    assert len([*home.glob("dpo-cache/locks/*.lock")]) == 2


def test_without_a_home_the_block_is_entered(home: Path) -> None:
    (home / "dpo-cache").write_text("no folder")
    with node_lock("hash"), node_lock("hash"):
        pass
