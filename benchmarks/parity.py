"""Compare dpo-cache with TRL 1.16: reference log-probs and, with --train, losses and gradient norms.

Both sides read one JSONL file, made from the first rows of a data set, in float32 on the CPU:

    sums     the log-prob of every completion under the reference, and TRL's `precompute_ref_log_probs`
    train    one epoch of policy-only training from the cache, and TRL's DPOTrainer with its live reference

TRL runs in `trl_side.py`, with a separate interpreter (`--trl-python`). The exit code is 1 if a difference
exceeds its limit, or if one side keeps a row that the other drops.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import columns, parse_rows, read_rows, write_lines

import dpo_cache
from dpo_cache.data import detect_format
from dpo_cache.lm import prepare

SUM_LIMIT = 5e-6  # relative, of a completion's summed log-prob
STEP_LIMIT = 1e-3  # relative, of a step's loss and gradient norm
BATCH_SIZE = 8  # all settings of the steps are the same as in trl_side.py

Sums = dict[int, tuple[float, float]]  # line of the JSONL file -> log-probs of chosen and rejected, in nats


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a local folder or a Hub id")
    parser.add_argument("--data", required=True, help="preference data in any format that dpo-cache reads")
    parser.add_argument("--rows", type=int, required=True, help="number of rows, from the first")
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--max-length", type=int, default=1024, help="longest prompt + answer, in tokens")
    parser.add_argument(
        "--same-library",
        action="store_true",
        help="run dpo-cache's linear layers with torch's library, as TRL does",
    )
    parser.add_argument("--train", action="store_true", help="also compare the steps of a training run")
    arguments = parser.parse_args()
    if arguments.same_library:
        prepare.use_fast_linear = lambda *_, **__: "torch"
    with tempfile.TemporaryDirectory() as folder:
        check = _Check(arguments.model, arguments.trl_python, arguments.max_length, Path(folder))
        numbers = check.write_rows(arguments.data, arguments.rows)
        agrees = check.compare_sums(numbers)
        if arguments.train:
            agrees &= check.compare_steps(len(numbers))
    print("both sides agree" if agrees else "the sides DISAGREE")
    return 0 if agrees else 1


class _Check:
    """One comparison: a model, and a folder with the rows and the results of both sides."""

    def __init__(self, model: str, trl_python: str, max_length: int, folder: Path):
        self.model, self.trl_python, self.max_length, self.folder = model, trl_python, max_length, folder
        self.rows, self.cache = folder / "rows.jsonl", str(folder / "cache")

    def write_rows(self, data: str, num_rows: int) -> list[int]:
        """Write the JSONL file, and return the row number of each of its lines. Rows with equal answers are
        left out.
        """
        rows = read_rows(data, num_rows)
        kept = parse_rows(rows)
        write_lines(map(columns, kept.values()), self.rows)
        print(
            f"rows: {len(rows)} of {Path(data).name} ({detect_format(list(rows[0]), rows[0])}), "
            f"{len(rows) - len(kept)} skipped: chosen equals rejected"
        )
        return list(kept)

    def compare_sums(self, numbers: list[int]) -> bool:
        """Print the largest difference of the summed log-probs, and return whether they agree."""
        ours, theirs = self._our_sums(), self._trl_sums()
        for name, lines in (("dpo-cache", ours.keys() - theirs.keys()), ("TRL", theirs.keys() - ours.keys())):
            if lines:
                print(
                    f"rows that only {name} keeps: {', '.join(str(numbers[line]) for line in sorted(lines))}"
                )
        places = [(line, side) for line in sorted(ours.keys() & theirs.keys()) for side in (0, 1)]
        our_sums, trl_sums = ([sums[line][side] for line, side in places] for sums in (ours, theirs))
        differences = relative_differences(our_sums, trl_sums)
        worst = max(range(len(places)), key=differences.__getitem__)
        line, side = places[worst]
        print(
            f"sums: {len(places)} completions, largest relative difference {differences[worst]:.2e} "
            f"(limit {SUM_LIMIT:.0e}),"
        )
        print(
            f"      {('chosen', 'rejected')[side]} of row {numbers[line]}: dpo-cache "
            f"{our_sums[worst]:.6f}, TRL {trl_sums[worst]:.6f}"
        )
        return differences[worst] <= SUM_LIMIT and ours.keys() == theirs.keys()

    def compare_steps(self, num_pairs: int) -> bool:
        """Print losses and gradient norms of both sides, and return whether they agree. Needs the cache that
        `compare_sums` fills.
        """
        ours, theirs = self._our_steps(num_pairs), self._run_trl("train")
        agrees = True
        for name, label in (("losses", "loss"), ("grad_norms", "grad norm")):
            differences = relative_differences(ours[name], theirs[name])
            for step, values in enumerate(zip(ours[name], theirs[name], differences, strict=True), 1):
                print(
                    "step {}: {:9}  dpo-cache {:.9f}  TRL {:.9f}  relative difference {:.2e}".format(
                        step, label, *values
                    )
                )
            print(f"{label}: largest relative difference {max(differences):.2e} (limit {STEP_LIMIT:.0e})")
            agrees &= max(differences) <= STEP_LIMIT
        return agrees

    def _our_sums(self) -> Sums:
        dpo_cache.precompute(
            self.model,
            str(self.rows),
            self.cache,
            name="rows",
            device="cpu",
            dtype="float32",
            max_length=self.max_length,
        )
        pairs = dpo_cache.open_cache(self.cache).pairs("rows")
        return {scored.pair.row: (scored.ref_chosen.logps, scored.ref_rejected.logps) for scored in pairs}

    def _trl_sums(self) -> Sums:
        made = self._run_trl("logps")
        return dict(zip(made["rows"], zip(made["chosen"], made["rejected"], strict=True), strict=True))

    def _our_steps(self, num_pairs: int) -> dict[str, list[float]]:
        output = self.folder / "run"
        dpo_cache.train(
            self.cache, str(output), device="cpu", precision="fp32", beta=0.1, lr=1e-5, lr_schedule="constant", warmup_ratio=0.0,
            weight_decay=0.0, max_grad_norm=1.0, shuffle=False, batch_size=BATCH_SIZE, max_steps=math.ceil(num_pairs / BATCH_SIZE),
        )  # fmt: skip
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return {
            "losses": [step["loss"] for step in steps],
            "grad_norms": [step["grad_norm"] for step in steps],
        }

    def _run_trl(self, mode: str) -> dict[str, list[Any]]:
        out = self.folder / f"trl-{mode}.json"
        script = Path(__file__).with_name("trl_side.py")
        command = [
            self.trl_python,
            str(script),
            mode,
            self.model,
            str(self.rows),
            str(out),
            "--max-length",
            str(self.max_length),
        ]
        subprocess.run(command, stdout=sys.stderr, check=True)
        return json.loads(out.read_text())


def relative_differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """`|ours - theirs| / |theirs|` of each; infinite if that is not finite, so that it exceeds every limit."""
    differences = (abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    return [difference if math.isfinite(difference) else math.inf for difference in differences]


if __name__ == "__main__":
    sys.exit(main())
