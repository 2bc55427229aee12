"""The operations that change a cache, on small caches, with a scorer that computes nothing.

    OPERATIONS["merge"](world)

A world is three caches: `cache`, which every operation reads or changes; `source`, from which `merge` and
`pull` copy; `target`, to which `push` copies. All files of `cache` are three days old, and it holds what an
old cache holds: parts and scores that nothing names but a writer is about to name, a reference without pair
sets, a pair set that is going to be replaced, scratch of a killed writer, completions that are stored twice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import dpo_cache
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.precomputing import cutting, here, pair_sets, run, units
from dpo_cache.store import completion_key, open_cache
from dpo_cache.store import pairs as pairs_module
from dpo_cache.store.upkeep import copy
from dpo_cache.store.upkeep.gc import collect_garbage
from dpo_cache.store.upkeep.remove import remove
from dpo_cache.types import Completion, Score

OLD_S = 3 * 24 * 3600.0
ROWS = [
    {"prompt": f"{number}?", "chosen": f"{number} yes", "rejected": "no" * (1 + number % 3)}
    for number in range(8)
]


@dataclass(frozen=True)
class World:
    """Three caches in one folder."""

    root: Path
    model: str

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def target(self) -> Path:
        return self.root / "target"

    def copy(self, root: Path) -> World:
        """The same caches, with the same times, in another folder; what was there goes."""
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.root, root)
        return World(root, self.model)

    def precompute(self, cache: Path, rows: Sequence[int], name: str) -> None:
        data = [ROWS[row] for row in rows]
        dpo_cache.precompute(self.model, data, cache, name=name, audit="off", log=lambda _: None)


def true_logps(key: bytes, num_tokens: int) -> np.ndarray:
    """What the reference gives a completion: float32 [num_tokens]. Every reference gives the same."""
    return -np.random.default_rng(int.from_bytes(key, "big")).random(num_tokens, np.float32)


# -- operations --------------------------------------------------------------------------------------------


def precompute(world: World) -> None:
    """Replaces a pair set. Of its completions some are scored, some are not; of its parts some are there."""
    world.precompute(world.cache, range(4), "made")


def compact(world: World) -> None:
    dpo_cache.compact(world.cache)


def gc(world: World) -> None:
    collect_garbage(open_cache(world.cache), scores=True)


def rm_pairs(world: World) -> None:
    _remove(world, "pairs", "made", with_pairs=False)


def rm_reference(world: World) -> None:
    """Removes the reference that all other operations use, with its pair sets."""
    _remove(world, "reference", reference_of(world), with_pairs=True)


def merge(world: World) -> None:
    dpo_cache.merge([world.source], world.cache)


def push(world: World) -> None:
    copy.copy_cache(open_cache(world.cache), open_cache(world.target, create=True))


def pull(world: World) -> None:
    copy.copy_cache(open_cache(world.source), open_cache(world.cache, create=True))


def repair(world: World) -> None:
    dpo_cache.verify(world.cache, repair=True)


OPERATIONS: dict[str, Callable[[World], None]] = {
    operation.__name__: operation
    for operation in (precompute, compact, gc, rm_pairs, rm_reference, merge, push, pull, repair)
}


def reference_of(world: World) -> str:
    """The reference of the source's pair set `merged`, which is also that of the cache's."""
    return open_cache(world.source).pairs("merged").reference_id


def _remove(world: World, kind: str, name: str, *, with_pairs: bool) -> None:
    remove(open_cache(world.cache), kind, name, with_pairs=with_pairs)


# -- the caches at the start -------------------------------------------------------------------------------


def make_world(root: Path, model: str) -> World:
    """The caches before any operation."""
    world = World(root, model)
    world.precompute(world.source, [7, 0], "merged")
    with other_reference():
        world.precompute(world.source, [6], "foreign")
        world.precompute(world.cache, [5], "lost")
    world.precompute(world.cache, [0, 1, 4], "made")
    world.precompute(world.cache, [5], "held")
    world.precompute(world.cache, [6, 2], "gone")
    for name in ("gone", "lost"):
        shutil.rmtree(world.cache / "pairs" / name)
    elsewhere = World(root / "elsewhere", model)
    elsewhere.precompute(elsewhere.cache, range(4), "made")
    _copy_parts(elsewhere.cache / "pairs/made", world.cache / "pairs/made")
    _copy_parts(world.source / "pairs/foreign", world.cache / "pairs/foreign")
    shutil.rmtree(elsewhere.root)
    reference, pair = reference_of(world), open_cache(world.cache).pairs("held")[0]
    twice = [(completion_key(pair.pair.chosen), pair.ref_chosen)]
    open_cache(world.cache).scores(reference).publish(twice)
    (world.cache / "references" / reference / "scores/.0123456789abcdef.tmp").write_bytes(b"half")
    _grow_old(world.root)
    return world


def damage(world: World) -> None:
    """Flip a byte of the log-probs in a shard whose completions a pair set holds, too, and cut a part that no
    manifest names but `precompute` is going to.
    """
    key = completion_key(open_cache(world.cache).pairs("held")[0].pair.rejected)
    for shard in world.cache.glob(f"references/{reference_of(world)}/scores/*.parquet"):
        if key in pq.read_table(shard, columns=["key"])["key"].to_pylist():
            content = bytearray(shard.read_bytes())
            footer_bytes = int.from_bytes(content[-8:-4], "little")
            content[-9 - footer_bytes] ^= 1
            shard.write_bytes(content)
    manifest = json.loads((world.cache / "pairs/made/train/manifest.json").read_bytes())
    named = {part["file"] for part in manifest["parts"]}
    unnamed = sorted(set((world.cache / "pairs/made/train").glob("*.parquet")))
    leftover = next(part for part in unnamed if part.name not in named)
    leftover.write_bytes(leftover.read_bytes()[:-20])
    _grow_old(world.root)


def _grow_old(root: Path) -> None:
    written = time.time() - OLD_S
    for path in root.rglob("*"):
        os.utime(path, (written, written))


def _copy_parts(source: Path, target: Path) -> None:
    """The parts without their manifest, as a pair set leaves that was replaced."""
    for file in source.rglob("*.parquet"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)


# -- the scorer --------------------------------------------------------------------------------------------


class StubRunner:
    """Scores four completions at a time."""

    attention = SimpleNamespace(name="stub")
    budget = SimpleNamespace(tokens=1)
    layer_major = None

    def score(self, completions: Sequence[Completion], *, rows_of: Any) -> Iterator[ScoringStep]:
        total = sum(map(len, completions))
        for start in range(0, len(completions), 4):
            places = range(start, min(start + 4, len(completions)))
            scores = [
                (
                    place,
                    Score(true_logps(completion_key(completions[place]), completions[place].num_tokens)),
                )
                for place in places
            ]
            yield ScoringStep(sum(len(completions[place]) for place in places), total, scores)


@contextmanager
def stubbed_scoring() -> Iterator[None]:
    """`precompute` with its own model folder, and without a model: the rest of it is real. What it reads from
    that folder is read once.
    """

    @contextmanager
    def opened(*_: Any, **__: Any) -> Iterator[StubRunner]:
        yield StubRunner()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(here, "open_reference", opened)
        patch.setattr(cutting, "random", SimpleNamespace(Random=lambda: Random(0)))  # steps in one order
        for name in ("read_config", "read_tokenizer", "identify_reference"):
            patch.setattr(run, name, _read_once(getattr(run, name)))
        patch.setattr(run, "open_target", _without_former_identity(run.open_target))
        patch.setattr(pair_sets, "datetime", _Noon, raising=False)  # or each second has manifests of its own
        patch.setattr(units, "FLUSH_S", 0.0)
        patch.setattr(pairs_module, "PART_PAIRS", 2)
        patch.setattr(copy, "ThreadPoolExecutor", _InOrder)  # steps in one order, all of them
        yield


def _without_former_identity(open_target: Callable[..., Any]) -> Callable[..., Any]:
    def opened(cache: Any, reference: Any, *rest: Any, **options: Any) -> Any:
        return open_target(cache, replace(reference, former=None), *rest, **options)

    return opened


class _InOrder:
    """An executor that does each task when it is submitted."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> _InOrder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        pass


class _Noon(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 1, 1, 12, tzinfo=tz)


def _read_once(real: Callable[..., Any]) -> Callable[..., Any]:
    found: list[Any] = []

    def read(*arguments: Any, **options: Any) -> Any:
        if not found:
            found.append(real(*arguments, **options))
        return found[0]

    return read


@contextmanager
def other_reference() -> Iterator[None]:
    """The model is another one."""
    real = run.identify_reference

    def identify(*arguments: Any, **options: Any) -> Any:
        reference = real(*arguments, **options)
        return replace(reference, identity={**reference.identity, "weights": "0" * 64})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "identify_reference", identify)
        yield
