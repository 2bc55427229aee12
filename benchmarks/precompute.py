"""The speed of scoring, compared with TRL 1.16 with `precompute_ref_log_probs=True` and with the machine's
limit.

    precompute.py --model MODEL --data FILE [--rows N] --trl-python PYTHON [--repeats 3]

Both sides score the same rows, in float32 on the CPU with the same threads and maximum length; TRL takes
batches of 8 pairs. They run alternately, each time in a fresh process, and `limit.py` measures the limit
between them. pairs/s do not include tokenizing and loading the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import run, show, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="preference data in any format that dpo-cache reads")
    parser.add_argument("--rows", type=int, help="number of rows, from the first; default: all")
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(arguments.data, arguments.rows, folder / "rows.jsonl")
        print(
            f"{Path(arguments.data).name}: {rows} rows, {arguments.repeats} alternating runs of each side, "
            f"maximum length {arguments.max_length}"
        )
        length = ["--max-length", str(arguments.max_length)]
        ours, theirs, limits = [], [], []
        for turn in range(arguments.repeats):
            ours.append(
                run(
                    sys.executable,
                    "our_side.py",
                    [arguments.model, str(folder / "rows.jsonl")],
                    folder / f"ours-{turn}.json",
                    length,
                )
            )
            (folder / "shapes.json").write_text(json.dumps(ours[-1]["shapes"]))
            limits.append(
                run(
                    sys.executable,
                    "limit.py",
                    [arguments.model, str(folder / "shapes.json")],
                    folder / f"limit-{turn}.json",
                    [],
                )
            )
            theirs.append(
                run(
                    arguments.trl_python,
                    "trl_side.py",
                    ["logps", arguments.model, str(folder / "rows.jsonl")],
                    folder / f"trl-{turn}.json",
                    length,
                )
            )
            print(
                f"  turn {turn + 1}: {pairs_per_s(ours[-1]):.2f}, TRL "
                f"{trl_pairs_per_s(theirs[-1]):.3f} pairs/s",
                flush=True,
            )
    report(ours, theirs, limits)


def pairs_per_s(ours: dict[str, Any]) -> float:
    return ours["first"]["pairs_kept"] / ours["first"]["scoring_s"]


def trl_pairs_per_s(theirs: dict[str, Any]) -> float:
    return len(theirs["rows"]) / theirs["scoring_s"]


def report(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], limits: list[dict[str, Any]]) -> None:
    speeds = [(pairs_per_s(one), trl_pairs_per_s(other)) for one, other in zip(ours, theirs, strict=True)]
    show("pairs/s, dpo-cache", [one for one, _ in speeds], "{:.2f}")
    show("pairs/s, TRL", [other for _, other in speeds], "{:.3f}")
    show("times as fast", [one / other for one, other in speeds], "{:.2f}")
    show(
        "share of the limit",
        [limit["limit_s"] / one["first"]["scoring_s"] for one, limit in zip(ours, limits, strict=True)],
        "{:.1%}",
    )
    parts = ("linear_s", "attention_s", "head_s")
    print(
        f"  {'limit, s':34} "
        + ", ".join(f"{part[:-2]} {statistics.median(limit[part] for limit in limits):.2f}" for part in parts)
    )
    show("peak memory, dpo-cache, GB", [one["first"]["peak_bytes"] / 1e9 for one in ours], "{:.2f}")
    show("peak memory, TRL, GB", [other["peak_bytes"] / 1e9 for other in theirs], "{:.2f}")
    above = [
        (
            one["first"]["peak_bytes"] - one["first"]["loaded_bytes"],
            other["peak_bytes"] - other["loaded_bytes"],
        )
        for one, other in zip(ours, theirs, strict=True)
    ]
    show("above the loaded model, dpo-cache, GB", [one / 1e9 for one, _ in above], "{:.3f}")
    show("above the loaded model, TRL, GB", [other / 1e9 for _, other in above], "{:.3f}")
    show("share of TRL's", [one / other for one, other in above], "{:.3f}")
    print(
        f"  {'tokens through the model':34} {ours[0]['first']['model_tokens']:,} of "
        f"{ours[0]['first']['data_tokens']:,} in the data"
    )
    print(
        f"  {'largest relative difference':34} {largest_difference(ours[0]['sums'], theirs[0]):.2e} of a sum"
    )
    show(
        "second run, times as fast",
        [one["first"]["elapsed_s"] / one["second"]["elapsed_s"] for one in ours],
        "{:.0f}",
    )
    show("second run, s", [one["second"]["elapsed_s"] for one in ours], "{:.2f}")


def largest_difference(sums: list[tuple[int, float, float]], theirs: dict[str, Any]) -> float:
    """The largest relative difference of a sum; exits if the sides keep different rows."""
    other_sums = dict(
        zip(theirs["rows"], zip(theirs["chosen"], theirs["rejected"], strict=True), strict=True)
    )
    if {row for row, _, _ in sums} != set(other_sums):
        sys.exit("the sides do not keep the same rows")
    return max(
        abs(mine - other) / abs(other)
        for row, *mine_both in sums
        for mine, other in zip(mine_both, other_sums[row], strict=True)
    )


if __name__ == "__main__":
    main()
