"""The best run, and a check whether its lead may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_cache.reporting.runs import RunRow

MIN_LEAD = 6  # pairs: the smallest lead that is significant in a sign test at 5%, as 2 * 0.5^6 < 0.05


def sort_rows(rows: Sequence[RunRow]) -> list[RunRow]:
    """Finished runs by their accuracy on evaluation pairs, the best first; then the others in their order."""
    return sorted(rows, key=lambda row: -row.accuracy if _is_ranked(row) else 1.0)  # type: ignore[operator]


def best_rows(rows: Sequence[RunRow]) -> list[RunRow]:
    """The finished runs with the highest accuracy: several if they tie; none if no accuracy is known."""
    ranked = [row for row in rows if _is_ranked(row)]
    highest = max((row.accuracy for row in ranked), default=None)  # type: ignore[type-var]
    return [row for row in ranked if row.accuracy == highest]


def describe_best(rows: Sequence[RunRow]) -> str | None:
    """A sentence on the best of several finished runs, with those that tie and those that are too close to
    rank.
    """
    best, finished = best_rows(rows), [row for row in rows if row.state == "finished" and row.is_evaluated]
    if len(finished) < 2:
        return None
    if not best:
        return "No run is the best: no accuracy is known, as all margins are rounding noise."
    sizes = {row.num_eval_pairs for row in finished}
    where = f"{best[0].accuracy:.1%}"
    if len(sizes) == 1 and None not in sizes:
        where += f" of {best[0].num_eval_pairs:,} {best[0].measured_on} pairs".replace("held out", "held-out")
    so_far = "" if all(row.state in ("finished", "failed") for row in rows) else " so far"
    text = f"The best{so_far} is {best[0].name}, with an accuracy of {where}."
    if len(best) > 1:
        each = " each" if " of " in where else ""
        text = f"The best{so_far} tie: {_listed(best)} have an accuracy of {where}{each}."
    close = [row for row in finished if row not in best and _is_close(row, best[0])]
    if close:
        text += (
            f" {_listed(close)} {'is' if len(close) == 1 else 'are'} less than {MIN_LEAD} pairs behind, "
            "which may be chance: more evaluation pairs would show it."
        )
    return text


def _is_close(row: RunRow, best: RunRow) -> bool:
    """Return whether a run is behind the best by so few of the same number of pairs that no sign test can
    distinguish them.
    """
    if row.accuracy is None or best.accuracy is None or row.num_eval_pairs != best.num_eval_pairs:
        return False
    return (best.accuracy - row.accuracy) * (row.num_eval_pairs or math.inf) < MIN_LEAD - 1e-6


def _is_ranked(row: RunRow) -> bool:
    return row.state == "finished" and row.is_evaluated and row.accuracy is not None


def _listed(rows: Sequence[RunRow]) -> str:
    names = [row.name for row in rows]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
