"""Promise 1: a shard, a reference, a pair set is wholly visible or absent, and survives power loss once it is
published.

Every file-system step of a cache's life is followed by a power cut, in every way it may leave the disk
(`power_cuts.py`), and what is left is checked: nothing torn is seen, all that was published is there, no
manifest names a missing part, and the cache can be used again. The last tests leave out one sync at a time
and see that the check notices.
"""

import itertools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from dpo_cache.store import open_cache
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.folders.local import LocalFolder
from tests.promises.life import live, read_back
from tests.promises.power_cuts import Dead, Model, RecordingDisk, RecordingFolder, Step, Tree
from tests.promises.soundness import faults

PLACE = "new/deeper/cache"  # folders above the cache are made, too


class FastDisk(Disk):
    """Without syncing: for using what a power cut left."""

    def sync_file(self, descriptor: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        path.stat()


pytestmark = pytest.mark.usefixtures("small_parts")


class Checker:
    """Puts what a power cut left on a real disk and looks at it; each tree once."""

    def __init__(self, room: Path):
        self._room, self._seen = room, dict[frozenset, list[str]]()

    @property
    def num_trees(self) -> int:
        return len(self._seen)

    def problems(self, tree: Tree, allowed: dict[str, set[bytes | None]]) -> list[str]:
        found = []
        for name, contents in allowed.items():
            if tree.get(f"{PLACE}/{name}") not in contents:
                found.append(
                    f"{name}: "
                    f"{'published, and gone or another' if None not in contents else 'not what was to be published'}"
                )
        signature = frozenset((name, content) for name, content in tree.items())
        if signature not in self._seen:
            self._seen[signature] = self._look(tree)
        return found + self._seen[signature]

    def _look(self, tree: Tree) -> list[str]:
        for name, content in sorted(tree.items()):
            path = self._room / name
            path.mkdir() if content is None else path.write_bytes(content)
        root = self._room / PLACE
        found = faults(root)
        if not found:
            # a reopened cache takes the same scores and pairs, and returns them
            live(LocalFolder(root, FastDisk()))
            read_back(LocalFolder(root))
            assert open_cache(root).pair_sets() == ["pairs/train"]
            found = faults(root)
        shutil.rmtree(self._room)
        self._room.mkdir()
        return found


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    room = tmp_path / "after"
    room.mkdir()
    return Checker(room)


def problems_after_each_step(base: Path, log: list[Step], checker: Checker, first: int = 0) -> Iterator[str]:
    """What a power cut after each step of the log, from the first on, may break."""
    model, chance = Model(base), random.Random(0)
    for number, step in enumerate(log):
        model.take(step)
        for tree in model.states(chance) if number >= first else ():
            for problem in checker.problems(tree, model.allowed):
                yield f"after step {number}, {step[0]}: {problem}"


def never(*_: Step) -> bool:
    return False


def record(base: Path, drops: Callable[[Step, Step], bool] = never) -> list[Step]:
    base.mkdir()
    log: list[Step] = []
    live(RecordingFolder(base / PLACE, RecordingDisk(log, drops)))
    return log


def test_1_a_power_cut_after_any_step_leaves_whole_files_and_all_that_was_published(
    tmp_path: Path, checker: Checker
) -> None:
    log = record(tmp_path / "base")
    kinds = {step[0] for step in log}
    assert {
        "make_folder",
        "create",
        "write",
        "sync_file",
        "rename",
        "sync_folder",
        "unlink",
        "remove_folder",
    } <= kinds
    assert list(problems_after_each_step(tmp_path / "base", log, checker)) == []
    assert len(log) > 150 and checker.num_trees > 80


def steps_of(log: list[Step]) -> list[Step]:
    """Only those of the disk."""
    return [step for step in log if step[0] not in ("publishing", "published", "removing", "removed")]


def problems_beside_a_killed_writer(
    tmp_path: Path, checker: Checker, steps: Iterable[int], drops: Callable[[Step, Step], bool]
) -> Iterator[str]:
    """One writer is killed after each of these steps, before it has synced, and another does all its work:
    then the power fails.
    """
    for last_step in steps:
        base = tmp_path / f"base{last_step}"
        base.mkdir()
        log: list[Step] = []
        with pytest.raises(Dead):
            live(RecordingFolder(base / PLACE, RecordingDisk(log, drops, last_step)))
        num_before = len(log)
        live(RecordingFolder(base / PLACE, RecordingDisk(log, drops)))
        model, chance = Model(base), random.Random(last_step)
        for number, step in enumerate(log):
            model.take(step)
            is_telling = step[0] == "published" or (step[0] == "rename" and step[2].name == "manifest.json")
            if number >= num_before and is_telling:
                for tree in model.states(chance, most=6):
                    for problem in checker.problems(tree, model.allowed):
                        yield f"killed after {last_step}, power cut after step {number}, {step[0]}: {problem}"


@pytest.mark.parametrize(
    "kinds",
    [["rename"], pytest.param(None, marks=pytest.mark.slow)],
    ids=["after every other rename", "after each step"],
)
def test_1_what_another_writer_left_unsynced_is_synced_by_the_one_who_builds_on_it(
    tmp_path: Path, checker: Checker, kinds: list[str] | None
) -> None:
    steps = [
        number
        for number, step in enumerate(steps_of(record(tmp_path / "whole")), start=1)
        if kinds is None or step[0] in kinds
    ]
    tried = steps[:-1:2] if kinds else steps[:-1]
    assert list(problems_beside_a_killed_writer(tmp_path, checker, tried, never)) == []


FORGOTTEN = {
    "the file": lambda step, before: step[0] == "sync_file",
    "the folder after the rename": lambda step, before: step[0] == "sync_folder" and before[0] == "rename",
    "the folders above": lambda step, before: step[0] == "sync_folder" and before[0] == "sync_folder",
    "the folder after a removal": lambda step, before: step[0] == "sync_folder" and before[0] == "unlink",
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_1_the_check_notices_a_sync_that_is_left_out(
    tmp_path: Path, checker: Checker, forgotten: str
) -> None:
    whole, log = record(tmp_path / "whole"), record(tmp_path / "base", FORGOTTEN[forgotten])
    # until then, nothing was left out
    first = next(
        number for number, (one, other) in enumerate(zip(whole, log, strict=False)) if one[0] != other[0]
    )
    assert next(problems_after_each_step(tmp_path / "base", log, checker, first), None) is not None


def test_1_the_check_notices_a_folder_that_is_not_synced_before_the_manifest(
    tmp_path: Path, checker: Checker
) -> None:
    def forgets(step: Step, before: Step) -> bool:
        return step[0] == "sync_folder" and before[0] == "sync_file"

    renamed = [
        (number, step[2].name)
        for number, step in enumerate(steps_of(record(tmp_path / "whole")), start=1)
        if step[0] == "rename"
    ]
    last_part = next(
        number for (number, _), (_, following) in itertools.pairwise(renamed) if following == "manifest.json"
    )
    problems = list(problems_beside_a_killed_writer(tmp_path, checker, [last_part], forgets))
    assert any("which is not there" in problem for problem in problems)
