"""`dpo-cache train`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dpo_cache.cli.output import ProgressLine, count, format_bytes, format_seconds, print_json, print_table
from dpo_cache.cli.parameters import command
from dpo_cache.cli.signals import StoppedEarly, StopRequest
from dpo_cache.train_options import TrainOptions

if TYPE_CHECKING:
    from dpo_cache.training.loop import TrainReport


@command(TrainOptions, json_help="Print the report as JSON.")
def train_command(options: TrainOptions, as_json: bool) -> None:
    """Train a policy on cached pairs. The reference model is not loaded, and the data set not read.

    Ctrl-C finishes the step and saves it; go on with --resume.
    """
    from dpo_cache.training.loop import train

    with ProgressLine("training") as line, StopRequest(line.remark) as request:

        def show(metrics: dict[str, Any]) -> None:
            step, total = metrics["step"], metrics["total_steps"]
            if "eval/loss" in metrics:
                line.remark(f"eval at step {step}: {_describe(metrics, 'eval/')}")
            else:
                detail = f"step {step}/{total}  {_describe(metrics)}  {metrics['pairs_per_s']:.2f} pairs/s"
                step_seconds.append(metrics["num_pairs"] / metrics["pairs_per_s"])
                left = (total - step) * sum(step_seconds) / len(step_seconds)
                line.update(step, total, f"{detail}  {format_seconds(left)} left")

        step_seconds: list[float] = []
        report = train(**asdict(options), on_metrics=show, say=line.remark, should_stop=lambda: request.is_asked)
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)
    if request.exit_code is not None and not report.finished:
        raise StoppedEarly(request.exit_code)


def _describe(metrics: dict[str, Any], prefix: str = "") -> str:
    loss, accuracy, margin = (metrics[prefix + name] for name in ("loss", "rewards/accuracies", "rewards/margins"))
    return f"loss {loss:.4f}  accuracy {accuracy:.1%}  margin {margin:+.4f}"


def _print_report(report: TrainReport) -> None:
    rows = [("steps", count(report.num_steps)), ("pairs", count(report.num_pairs))]
    if report.first and report.last:
        rows.append(("loss, first and last step", f"{report.first['loss']:.4f}  {report.last['loss']:.4f}"))
    if report.eval_before:
        rows.append(("held out, before", _describe(report.eval_before, "eval/")))
    if report.eval_after:
        rows.append(("held out, after", _describe(report.eval_after, "eval/")))
    rows += [("time", format_seconds(report.elapsed_s)), ("peak memory", format_bytes(report.peak_bytes))]
    print_table(f"{report.output}: {'trained' if report.finished else 'stopped early'}", rows)
    if report.finished:
        print(f"The model lies in {report.model}, one line a step in {report.output}/metrics.jsonl.")
        print(f'Next: AutoModelForCausalLM.from_pretrained("{report.model}")')
    else:
        print(f"Saved after step {report.num_steps}. Next: the same command with --resume.")
