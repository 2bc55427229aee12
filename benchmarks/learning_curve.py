"""Accuracy, margin and loss on held-out pairs during training.

    learning_curve.py --model MODEL --data FILE [--rows N] [--plot FILE.svg] [option=value ...]

Scores the rows with the model, holds out a fifth of the prompts, and trains on the rest from the cache.
`option=value` are options of `dpo_cache.train`. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from rows import write_rows

import dpo_cache
from dpo_cache.progress import format_share

EVERY = 10
CURVES = {
    "eval/rewards/accuracies": "held-out accuracy",
    "eval/rewards/margins": "held-out reward margin",
    "eval/loss": "held-out loss",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    options: dict[str, Any] = dict(entry.split("=", 1) for entry in arguments.options)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_rows = write_rows(arguments.data, arguments.rows, folder / "rows.jsonl")
        dpo_cache.precompute(arguments.model, str(folder / "rows.jsonl"), str(folder / "cache"), name="rows")
        report = dpo_cache.train(
            folder / "cache",
            folder / "run",
            eval_fraction=0.2,
            eval_every=EVERY,
            batch_size=8,
            lr=5e-6,
            on_metrics=lines.append,
            **options,
        )
    evaluations = [line for line in lines if "eval/loss" in line]
    print(
        f"{Path(arguments.data).name}: {num_rows} rows, {report.num_pairs} pairs trained on, "
        f"{evaluations[0]['eval/num_pairs']} held out"
    )
    print(f"{'step':>5}  {'accuracy':>8}  {'margin':>7}  {'loss':>6}")
    for line in evaluations:
        print(
            f"{line['step']:>5}  {format_share(line['eval/rewards/accuracies']):>8}  "
            f"{line['eval/rewards/margins']:>+7.3f}  {line['eval/loss']:>6.4f}"
        )
    print(f"{report.elapsed_s / 60:.1f} min, {report.peak_bytes / 1e9:.2f} GB")
    if arguments.plot:
        plot(evaluations, arguments.plot)


def plot(evaluations: list[dict[str, Any]], path: Path) -> None:
    """Draw the three curves in one row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(11, 3), layout="constrained")
    for panel, (name, label) in zip(panels, CURVES.items(), strict=True):
        panel.plot(
            [line["step"] for line in evaluations],
            [math.nan if line[name] is None else line[name] for line in evaluations],
            marker=".",
            color="#1f6f8b",
        )
        panel.set(xlabel="step", title=label)
        panel.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
