"""Promise 10: any two operations on one cache, one in the midst of the other and either of them killed, leave
what they would leave one after the other.

precompute, compact, gc, rm, merge, push, pull and repair, in pairs and in both orders: the second operation
runs before a step of the first on the disk. At every moment each pair set that a manifest names is complete
and readable (but see `Interleaving`). In the end, after each operation that was killed or refused has been
given again, no value, score or pair set is lost or another one, and `verify` finds nothing. An outside reader
(DuckDB) compares, see `outside_reader.py`.
"""

import itertools
from collections.abc import Iterator

import pytest

from tests.promises.interleaving import Interleaving, Stage
from tests.promises.operations import OPERATIONS, World, damage, make_world, stubbed_scoring

PAIRS = [(first, second, False) for first, second in itertools.product(OPERATIONS, repeat=2)] + [
    (first, second, True)
    for first, second in itertools.product(OPERATIONS, repeat=2)
    if "repair" in (first, second)
]

LAST_MOMENTS = [
    ("push", "precompute", "rename"),
    ("pull", "gc", "rename"),
    ("merge", "gc", "rename"),
    ("merge", "rm_reference", "rename"),
    ("precompute", "gc", "rename"),
    ("precompute", "rm_reference", "rename"),
    ("compact", "rm_reference", "rename"),
    ("gc", "precompute", "rename"),
    ("rm_pairs", "precompute", "rename"),
    ("rm_reference", "compact", "unlink"),
]
SAMPLE = 5  # one pair in how many is played by `make test`; each operation is first and second in some


@pytest.fixture(scope="module")
def worlds(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, World]]:
    root = tmp_path_factory.mktemp("worlds")
    with stubbed_scoring():
        whole = make_world(root / "whole", model_folder)
        damaged = whole.copy(root / "damaged")
        damage(damaged)
        yield {False: whole, True: damaged}


@pytest.fixture(scope="module")
def stage(worlds: dict[bool, World], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(worlds, tmp_path_factory.mktemp("stage") / "world")


def test_10_some_interleavings_of_two_operations_end_as_in_series(stage: Stage) -> None:
    for number, (first, second, is_damaged) in enumerate(PAIRS[::SAMPLE]):
        plans = list(stage.plans(first, second, is_damaged=is_damaged))
        stage.play(plans[number * 37 % len(plans)])
    differences, stage.tally.differences = stage.tally.differences, []
    assert differences == []
    assert stage.tally.interleavings >= len(PAIRS[::SAMPLE]) and stage.tally.kills > 5


def test_10_the_second_just_before_the_first_names_or_removes_its_last_file(stage: Stage) -> None:
    """Where operations are most likely to miss each other."""
    for first, second, step in LAST_MOMENTS:
        at = max(number for number, kind in enumerate(stage.steps(first, False), 1) if kind == step)
        stage.play(Interleaving(first, second, at))
    moved = max(number for number, kind in enumerate(stage.steps("repair", True), 1) if kind == "rename")
    stage.play(Interleaving("repair", "gc", moved, "first later", 1, is_damaged=True))
    differences, stage.tally.differences = stage.tally.differences, []
    assert differences == []


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "is_damaged"), PAIRS)
def test_10_every_interleaving_ends_as_in_series(
    stage: Stage, first: str, second: str, is_damaged: bool
) -> None:
    for plan in stage.plans(first, second, is_damaged=is_damaged):
        stage.play(plan)
    differences, stage.tally.differences = stage.tally.differences, []
    assert differences == []
