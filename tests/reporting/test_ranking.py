"""Which run is the best, and when none is."""

import pytest

from dpo_cache.reporting.ranking import best_rows, describe_best, sort_rows
from dpo_cache.reporting.runs import RunRow


def row(
    name: str, accuracy: float | None, *, pairs: int = 40, state: str = "finished", on: str = "held out"
) -> RunRow:
    numbers = dict.fromkeys(
        ("accuracy_before", "margin", "mean_loss", "chosen_reward", "rejected_reward"), 0.5
    )
    costs = dict.fromkeys(("pairs_per_s", "steps_s"), 1.0)
    return RunRow(
        name=name, options={}, state=state, num_steps=1, total_steps=1, measured_on=on, accuracy=accuracy, **numbers, **costs,
        peak_bytes=1, num_eval_pairs=pairs,
    )  # fmt: skip


ALONE = "The best is a, with an accuracy of 90.0% of 40 held-out pairs."


@pytest.mark.parametrize(
    ("rows", "best", "text"),
    [
        ([row("a", 0.9), row("b", 0.7)], ["a"], ALONE),
        ([row("b", 0.7), row("a", 0.9), row("c", 0.9)], ["a", "c"],
            "The best tie: a and c have an accuracy of 90.0% of 40 held-out pairs each."),
        ([row("a", 0.9), row("b", 0.85), row("c", 0.8), row("d", 0.75)], ["a"],
            f"{ALONE} b and c are less than 6 pairs behind, which may be chance: more evaluation pairs would show it."),
        ([row("a", 0.9), row("b", 0.9), row("c", 0.9), row("d", 0.875)], ["a", "b", "c"],
            "The best tie: a, b and c have an accuracy of 90.0% of 40 held-out pairs each. d is less than 6 pairs "
            "behind, which may be chance: more evaluation pairs would show it."),
        ([row("a", 0.9), row("b", 0.85, pairs=20)], ["a"], "The best is a, with an accuracy of 90.0%."),
        ([row("a", 0.9, on="evaluation"), row("b", 0.5, on="evaluation")], ["a"],
            "The best is a, with an accuracy of 90.0% of 40 evaluation pairs."),
        ([row("a", 0.9), row("b", None)], ["a"], ALONE),
        ([row("a", None), row("b", None)], [],
            "No run is the best: no accuracy is known, as all margins are rounding noise."),
        ([row("a", 0.9), row("b", 0.7), row("c", 0.95, state="stopped")], ["a"],
            "The best so far is a, with an accuracy of 90.0% of 40 held-out pairs."),
        ([row("a", 0.9)], ["a"], None),
        ([row("a", 0.9, on="training"), row("b", 0.9, on="training")], [], None),
    ],
)  # fmt: skip
def test_the_best_is_named_with_those_that_tie(rows: list[RunRow], best: list[str], text: str | None) -> None:
    assert [one.name for one in best_rows(rows)] == best
    assert describe_best(rows) == text
    assert [one.name for one in sort_rows(rows)][: len(best)] == best
