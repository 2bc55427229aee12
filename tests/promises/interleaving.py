"""Two operations on one cache, the second in the midst of the first, either of them killed; and what must be
true of the caches at every moment and in the end.

Nothing here runs at the same time: the first operation stops before one of its steps on the disk, the second
runs, and the first continues. So every interleaving can be repeated.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cache.errors import CacheError, CorruptShardError, NotInCacheError
from dpo_cache.store.folders import local
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.upkeep.verify import verify_cache
from tests.promises.operations import OPERATIONS, World, true_logps
from tests.promises.outside_reader import Contents, read_cache
from tests.promises.refusals import TroubledDisk

# steps that others can see, and those by which an operation sees others
CHANGES = ("make_folder", "create", "rename", "unlink", "remove_folder")
LOOKS = ("status", "names", "entries", "read", "open")
EACH = 5  # one in how many looks is interrupted
TAKES_AWAY = ("gc", "rm_pairs", "rm_reference")  # what others may have begun to use

Trouble = Callable[[int, str, tuple], None]  # number, kind and arguments of a step
Outcome = BaseException | None


class Killed(BaseException):
    """The operation's process is killed."""


class SteppedDisk(TroubledDisk):
    """Calls `trouble` before each step. If that kills the operation, none of its later steps are taken."""

    is_dead = False

    def meet(self, step: str, *arguments: Any) -> None:
        if self.is_dead:
            raise Killed
        try:
            super().meet(step, *arguments)
        except Killed:
            self.is_dead = True
            raise

    def open(self, path: Path) -> Any:
        self.meet("open", path)
        return Disk.open(self, path)

    def close(self, descriptor: int) -> None:
        Disk.close(self, descriptor)  # also of a process that is killed
        self.meet("close", descriptor)


def perform(world: World, operation: str, trouble: Trouble = lambda *_: None) -> Outcome:
    """Run the operation on a disk of its own. Returns the error or the kill that ended it."""
    disk = SteppedDisk(trouble)
    with _on_disk(disk):
        try:
            OPERATIONS[operation](world)
        except (Exception, Killed) as error:
            return Killed() if disk.is_dead else error
    return Killed() if disk.is_dead else None


@contextmanager
def _on_disk(disk: Disk) -> Iterator[None]:
    before = local.Disk
    local.Disk = lambda: disk  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        local.Disk = before  # type: ignore[misc]


@dataclass(frozen=True)
class Interleaving:
    """The second operation runs before the step `at` of the first, which is counted from 1.

    One that is killed `first later` may leave a pair set incomplete until it is given again: a removal that
    has hidden a file and not yet looked who names it, or a writer that has published a manifest and not yet
    looked whether all that it names is still there.

    kill    nothing       the second runs whole, then the first continues
            first         the second runs whole, and the first does not continue
            first later   the second runs whole, and the first is killed at its `kill_at`th change after that
            second        the second is killed at its `kill_at`th change, then the first continues
    """

    first: str
    second: str
    at: int
    kill: str = "nothing"
    kill_at: int = 0
    is_damaged: bool = False

    def __str__(self) -> str:
        killed = "" if self.kill == "nothing" else f", {self.kill} killed at {self.kill_at}"
        damaged = " (damaged cache)" if self.is_damaged else ""
        return f"{self.second} before step {self.at} of {self.first}{killed}{damaged}"


@dataclass(frozen=True)
class End:
    """The caches after operations one after the other, and the kind of error of each."""

    world: World
    cache: Contents
    target: Contents
    outcomes: tuple[tuple[str, type | None], ...] = ()


@dataclass
class Tally:
    """Counts over all interleavings that were played."""

    interleavings: int = 0
    kills: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # operations that had to be repeated
    differences: list[str] = field(default_factory=list)


class Stage:
    """Plays interleavings on copies of the worlds (a whole one and a damaged one), and compares the ends with
    those of the same operations one after the other.
    """

    def __init__(self, worlds: dict[bool, World], room: Path):
        self._worlds, self._room = worlds, room
        self._known_faults = {
            is_damaged: set(read_cache(world.cache).faults) for is_damaged, world in worlds.items()
        }
        self._steps: dict[tuple[str, bool], list[str]] = {}
        self._ends: dict[tuple[bool, tuple[str, ...]], End] = {}
        self._seen: dict[frozenset, Any] = {}
        self.tally = Tally()

    # -- plans -----------------------------------------------------------------------------------------

    def plans(self, first: str, second: str, *, is_damaged: bool = False) -> Iterator[Interleaving]:
        """The second before each change of the first, and before some of its looks: other ones with each
        second. At each of these points nothing is killed, or the first at once; at some of them also the
        first later, or the second.
        """
        steps = self.steps(first, is_damaged)
        changes = [at for at, step in enumerate(steps, 1) if step in CHANGES]
        looks = [at for at, step in enumerate(steps, 1) if step in LOOKS]
        some = looks[list(OPERATIONS).index(second) % EACH :: EACH]
        num_changes = sum(step in CHANGES for step in self.steps(second, is_damaged))
        for at in sorted(changes + some):
            yield Interleaving(first, second, at, is_damaged=is_damaged)
            if at in changes:
                yield Interleaving(first, second, at, "first", is_damaged=is_damaged)
            if at in changes or at in some[::EACH]:
                if changes and at < changes[-1]:
                    yield Interleaving(first, second, at, "first later", 1 + at % 3, is_damaged)
                if num_changes:
                    yield Interleaving(first, second, at, "second", 1 + at % num_changes, is_damaged)

    def steps(self, operation: str, is_damaged: bool) -> list[str]:
        """Kinds of the operation's steps on the disk, in order, when nothing else happens."""
        if (operation, is_damaged) not in self._steps:
            found: list[str] = []
            perform(self._fresh(is_damaged), operation, lambda number, step, _: found.append(step))
            self._steps[operation, is_damaged] = found
        return self._steps[operation, is_damaged]

    # -- playing ---------------------------------------------------------------------------------------

    def play(self, plan: Interleaving) -> None:
        """Note everything that is wrong at any moment, and each difference to the serial ends."""
        world, found = self._fresh(plan.is_damaged), list[str]()
        outcomes = self._run(world, plan, found)
        self.tally.interleavings += 1
        self.tally.kills += sum(isinstance(outcome, Killed) for outcome in outcomes.values())
        if not (plan.kill == "first later" and isinstance(outcomes["first"], Killed)):
            found += self._faults(world, plan, "after both")
        names = {"first": plan.first, "second": plan.second}
        for place, outcome in outcomes.items():
            if outcome is None:
                continue
            found += _problems_of_refusal(outcome, plan, names[place])
            is_refusal = not isinstance(outcome, Killed)
            self.tally.refused[f"{names[place]} of {plan.first}, {plan.second}"] += is_refusal
            again = perform(world, names[place])
            had_done_all = isinstance(outcome, Killed) and isinstance(again, NotInCacheError)
            outcomes[place] = None if had_done_all and names[place].startswith("rm") else again
            found += self._faults(world, plan, f"after {names[place]} again")
        final = [(names[place], _class_of(outcome)) for place, outcome in outcomes.items()]
        found += self._compare(world, plan, final)
        self.tally.differences += [f"{plan}: {difference}" for difference in found]

    def _run(self, world: World, plan: Interleaving, found: list[str]) -> dict[str, Outcome]:
        """The outcome of each operation, in the order in which they ended."""
        outcomes: dict[str, Outcome] = {}
        num_changes = 0

        def kill_second(number: int, step: str, _: tuple) -> None:
            nonlocal num_changes
            num_changes += step in CHANGES
            if plan.kill == "second" and num_changes == plan.kill_at:
                raise Killed

        def in_the_midst(number: int, step: str, _: tuple) -> None:
            nonlocal num_changes
            if number == plan.at:
                outcomes["second"] = perform(world, plan.second, kill_second)
                found.extend(self._faults(world, plan, f"after {plan.second}"))
                num_changes = 0
                if plan.kill == "first":
                    raise Killed
            elif number > plan.at and plan.kill == "first later":
                num_changes += step in CHANGES
                if num_changes == plan.kill_at:
                    raise Killed

        first = perform(world, plan.first, in_the_midst)
        return {**outcomes, "first": first}

    def _fresh(self, is_damaged: bool) -> World:
        return self._worlds[is_damaged].copy(self._room)

    # -- comparing -------------------------------------------------------------------------------------

    def _end(self, is_damaged: bool, order: tuple[str, ...]) -> End:
        """The end of these operations, each after the one before it."""
        if (is_damaged, order) not in self._ends:
            if order:
                before = self._end(is_damaged, order[:-1])
                world = before.world.copy(self._room.with_name("-".join((str(is_damaged), *order))))
                outcomes = (*before.outcomes, (order[-1], _class_of(perform(world, order[-1]))))
            else:
                world, outcomes = self._worlds[is_damaged], ()
            end = End(world, *self._look(world), outcomes)
            self._ends[is_damaged, order] = end
            faults = {*end.cache.faults, *end.target.faults} - self._known_faults[is_damaged]
            self.tally.differences += [f"{', '.join(order)} in series: {fault}" for fault in faults]
        return self._ends[is_damaged, order]

    def _faults(self, world: World, plan: Interleaving, moment: str) -> list[str]:
        """What the outside reader finds wrong now, beyond the damage at the start."""
        faults = {fault for contents in self._look(world) for fault in contents.faults}
        return [f"{moment}: {fault}" for fault in sorted(faults - self._known_faults[plan.is_damaged])]

    def _compare(
        self, world: World, plan: Interleaving, outcomes: list[tuple[str, type | None]]
    ) -> Iterator[str]:
        one, other, after_kill = plan.first, plan.second, plan.kill != "nothing"
        ends = [self._end(plan.is_damaged, order) for order in ((one, other), (other, one))]
        start = self._end(plan.is_damaged, ())
        found = list(_differences_to(self._look(world), outcomes, ends, start, after_kill=after_kill))
        if found:  # one that was given again may have had its effect before
            again = ((one, other, one), (other, one, other))
            ends += [self._end(plan.is_damaged, order) for order in again]
            found = list(_differences_to(self._look(world), outcomes, ends, start, after_kill=after_kill))
        yield from found
        for root in (world.cache, world.target):
            yield from (f"verify: {problem}" for problem in self._problems(root))
        if not plan.is_damaged and (world.cache / ".quarantine").exists():
            yield "a file of a cache without damage was moved aside"
        if _signature(world.source) != _signature(self._worlds[plan.is_damaged].source):
            yield "the source was changed"

    def _look(self, world: World) -> tuple[Contents, Contents]:
        cache, target = (self._once(root, "read", read_cache) for root in (world.cache, world.target))
        return cache, target

    def _problems(self, root: Path) -> list[str]:
        def verify(root: Path) -> list[str]:
            return [str(problem) for problem in verify_cache(root).problems] if root.exists() else []

        return self._once(root, "verify", verify)

    def _once(self, root: Path, purpose: str, look: Callable[[Path], Any]) -> Any:
        """The result for these files; many interleavings end with the same ones."""
        signature = frozenset({(purpose, b""), *_signature(root)})
        if signature not in self._seen:
            self._seen[signature] = look(root)
        return self._seen[signature]


def _signature(root: Path) -> frozenset:
    """Names and digests of all visible files."""
    return frozenset(
        (path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).digest())
        for path in root.rglob("[!.]*")
        if path.is_file() and ".quarantine" not in path.parts
    )


def _differences_to(
    found: tuple[Contents, Contents],
    outcomes: list[tuple[str, type | None]],
    ends: list[End],
    start: End,
    *,
    after_kill: bool,
) -> Iterator[str]:
    with_gc = any(name == "gc" for name, _ in outcomes)
    for name, outcome in outcomes:
        if (name, outcome) not in {entry for end in ends for entry in end.outcomes}:
            yield f"{name} ends with {outcome}, and in no serial order"
    yield from _differences(
        "cache", found[0], [end.cache for end in ends], start.cache, with_gc=with_gc, after_kill=after_kill
    )
    yield from _differences(
        "target", found[1], [end.target for end in ends], start.target, with_gc=with_gc, after_kill=after_kill
    )


def _differences(
    place: str, found: Contents, serial: list[Contents], start: Contents, *, with_gc: bool, after_kill: bool
) -> Iterator[str]:
    """Each pair set is that of one of the serial ends. Scores and references are those that all of them have,
    and none that no one has; leftovers of the start may wait for the next `gc`, and so may what a `repair`
    had restored from pair sets when it was killed. After `gc` a score may be left only in a pair set: it
    removes scores that no pair set held when it looked.
    """
    for name in sorted({name for contents in (found, *serial) for name in contents.pair_sets}):
        if found.pair_sets.get(name) not in [contents.pair_sets.get(name) for contents in serial]:
            yield f"{place}: pair set {name} is that of no serial order"
    needed = [end.references for end in serial]
    yield from _outside(f"{place}: reference", found.references, needed, start.references)
    for reference in sorted({name for contents in (found, *serial) for name in contents.scores}):
        scores = found.scores.get(reference, {})
        if with_gc:
            scores = {**found.scores_in_pairs(reference), **scores}
        others = [contents.scores.get(reference, {}) for contents in serial]
        possible = {
            **start.scores.get(reference, {}),
            **(start.scores_in_pairs(reference) if after_kill else {}),
            **(found.scores_in_pairs(reference) if with_gc else {}),
        }
        yield from _outside(f"{place}: score", scores, others, possible)
        for key, token_logps in scores.items():
            if token_logps != tuple(true_logps(key, len(token_logps)).tolist()):
                yield f"{place}: score {key.hex()[:8]} has another value"


def _outside(
    kind: str, found: dict[Any, Any], serial: list[dict[Any, Any]], start: dict[Any, Any]
) -> Iterator[str]:
    needed, possible = set.intersection(*map(set, serial)), set.union(set(start), *map(set, serial))
    yield from (f"{kind} {_short(name)} is lost" for name in sorted(needed - found.keys()))
    yield from (f"{kind} {_short(name)} is in no serial order" for name in sorted(found.keys() - possible))


def _short(name: bytes | str) -> str:
    return (name.hex() if isinstance(name, bytes) else name)[:8]


def _problems_of_refusal(outcome: Outcome, plan: Interleaving, operation: str) -> Iterator[str]:
    """An operation may be refused where the other one takes away what it needs, by one clear error."""
    if outcome is None or isinstance(outcome, Killed):
        return
    if not isinstance(outcome, CacheError) or (
        isinstance(outcome, CorruptShardError) and not plan.is_damaged
    ):
        yield f"{operation} raised {outcome!r}"
    elif not plan.is_damaged and not {plan.first, plan.second} & set(TAKES_AWAY):
        yield f"{operation} was refused: {outcome!r}"


def _class_of(outcome: Outcome) -> type | None:
    return None if outcome is None else type(outcome)
