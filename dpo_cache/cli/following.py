"""The commands to suggest after pairs were stored. No suggestion trains on pairs for evaluation.

A pair set is for evaluation by its name or split: `heldout/train`, `prefs/test`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from dpo_cache.cli.output import command_line, train_line
from dpo_cache.errors import DpoCacheError

EVALUATION_WORDS = {
    "dev", "eval", "evals", "evaluation", "held", "heldout", "holdout", "test", "tests", "testing", "val",
    "valid", "validation",
}  # fmt: skip


def is_for_evaluation(pair_set: str) -> bool:
    """Return whether the name or split in `NAME/SPLIT` is usual for pairs to evaluate on."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", pair_set)
    return not EVALUATION_WORDS.isdisjoint(map(str.lower, words))


def following_lines(cache: str, names: Collection[str], *more: str) -> list[str]:
    """The commands that follow for pair sets of a cache, see `suggest`."""
    from dpo_cache.store import open_cache

    opened, references = open_cache(cache), {}
    for name in opened.pair_sets():
        try:
            references[name] = opened.pairs(name).reference_id
        except DpoCacheError:  # the suggestion leaves it out; using it raises the error
            continue
    return suggest(cache, names, references, *more)


def suggest(
    cache: str, names: Collection[str], references: Mapping[str, str | None], *more: str
) -> list[str]:
    """Commands that train on the pair sets with these names, or evaluate on those that are for evaluation.

    `references` maps each pair set of the cache to the reference that scored it: pairs of one reference go
    together. `more` are further arguments of `train`.
    """
    lines = []
    for name in names:
        if not is_for_evaluation(name):
            tests = [other for other in _of_reference(references, name) if is_for_evaluation(other)]
            evaluation = ["--eval-pairs", tests[0]] if len(tests) == 1 else []
            lines.append(train_line(cache, name, *evaluation, *more))
    if lines:
        return lines
    for name in names:
        trained = [other for other in _of_reference(references, name) if not is_for_evaluation(other)]
        if trained:
            lines.append(train_line(cache, trained[0], "--eval-pairs", name, *more))
        else:
            lines.append(command_line("eval", "--cache", cache, "--pairs", name, "--model", "MODEL"))
    return lines


def _of_reference(references: Mapping[str, str | None], name: str) -> list[str]:
    """The other pair sets that the same reference has scored."""
    return [other for other, id in references.items() if other != name and id == references.get(name, "")]
