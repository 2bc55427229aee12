import numpy as np
from hypothesis import given

from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.plans import plan_tree
from dpo_cache.types import Completion
from tests.lm.forest.test_layout import completions, path_of


@given(completions)
def test_the_tree_plan_gives_every_segment_its_whole_path(given_completions: list[Completion]) -> None:
    forest = build_forest(given_completions)
    plan = plan_tree(forest)
    atom_ends = np.cumsum(plan.atom_lengths)
    for segment, atoms in zip(plan.segments, plan.path_atoms, strict=True):
        keys = [
            position
            for atom in atoms
            for position in range(atom_ends[atom] - plan.atom_lengths[atom], atom_ends[atom])
        ]
        assert keys == path_of(forest, segment.end - 1)
        assert keys[segment.depth :] == list(range(segment.start, segment.end))
