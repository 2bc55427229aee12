"""`dpo-cache train`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cache.cli.output import (
    ProgressLine,
    command_line,
    count,
    forecast_rows,
    format_bytes,
    format_seconds,
    print_json,
    print_table,
    print_text,
    remark,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.cli.signals import StoppedEarly, StopRequest
from dpo_cache.log import Log, phase
from dpo_cache.options.placement import PRESETS, Placement, next_preset, placement_of
from dpo_cache.options.run_config import evaluation_name
from dpo_cache.options.run_losses import loss_arguments
from dpo_cache.options.train import TrainOptions
from dpo_cache.progress import describe_metrics, show_training
from dpo_cache.training.launch import is_quiet_rank, launch, launched_rank, with_launched_config

if TYPE_CHECKING:
    from dpo_cache.training.output.report import TrainReport


@command(TrainOptions, complete=lambda given: with_launched_config(given, remark))
def train_command(options: TrainOptions, as_json: bool) -> None:
    """Train a policy on cached pairs. The reference model is not loaded, and the data set not read.

    Ctrl-C or SIGTERM finishes the step and saves it; `dpo-cache train --resume RUN` continues.
    """
    num_ranks = options.launch or 1
    if launched_rank() is not None:
        report, exit_code = _train_with_others(options)
    else:
        _check(options, num_ranks)
        if num_ranks > 1:
            sys.exit(launch(num_ranks, sys.argv[1:]))
        report, exit_code = _train(options)
    if not is_quiet_rank():
        _show(report, options, as_json)
    if exit_code is not None and not report.finished:
        raise StoppedEarly(exit_code)


def _check(options: TrainOptions, num_ranks: int) -> None:
    """Raise the errors that can be found without torch."""
    from dpo_cache.planning.start import check_train
    from dpo_cache.training.output.run_start import check_output, find_start
    from dpo_cache.training.output.tracker_access import check_trackers

    options.check_ranks(num_ranks)
    check_train(options)
    resume, clears = bool(options.resume), not options.dry_run
    find_start(Path(options.output), lambda _: None, resume=resume, clears=clears)
    check_output(Path(options.output))
    check_trackers(options.log_to, is_dry_run=options.dry_run)


def _train_with_others(options: TrainOptions) -> tuple[TrainReport, int | None]:
    """Train in one of several processes: they join before they check, so that errors are reported once."""
    from dpo_cache.training.ranks import open_ranks

    with open_ranks(options) as ranks:
        ranks.on_main(lambda: _check(options, ranks.size))
        return _train(options)


def _train(options: TrainOptions) -> tuple[TrainReport, int | None]:
    """The report, and the exit code if a signal has stopped the run."""
    from dpo_cache.training.output.run_start import find_checkpoints

    when_stopped(_stopped_at_once(options.output, []))
    with ProgressLine("training") as line:
        with phase("importing libraries"):
            from dpo_cache.training.loop import train

        # some trackers print, but stdout is only for the report
        without_prints = redirect_stdout(sys.stderr)
        log: Log = (lambda _: None) if is_quiet_rank() else line.remark
        with StopRequest(log) as request, without_prints:
            try:
                report = train(
                    **asdict(options),
                    on_metrics=lambda metrics: show_training(line, metrics),
                    log=log,
                    should_stop=lambda: request.is_asked,
                )
            except KeyboardInterrupt:
                when_stopped(_stopped_at_once(options.output, find_checkpoints(Path(options.output))))
                raise
    return report, request.exit_code


def _show(report: TrainReport, options: TrainOptions, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
    elif report.is_dry_run:
        _print_dry_run(report)
    else:
        _print_report(report, options)


def _print_report(report: TrainReport, options: TrainOptions) -> None:
    rows = [("steps", count(report.num_steps)), ("pairs", count(report.num_pairs)), _trained(report)]
    if report.first and report.last:
        rows.append(("loss, first and last step", f"{report.first['loss']:.4f}  {report.last['loss']:.4f}"))
    for when, metrics in (("before", report.eval_before), ("after", report.eval_after)):
        if metrics:
            rows.append((f"{_evaluation(report)}, {when}", describe_metrics(metrics, "eval/")))
    best = report.best
    if best and best["step"] != report.num_steps:
        rows.append(("best evaluation", f"{best['measure']} {best['value']:.4f} at step {best['step']}"))
    rows += [("time", format_seconds(report.elapsed_s)), ("peak memory", format_bytes(report.peak_bytes))]
    if not report.finished:
        print_table(f"{report.output}: stopped early", rows)
        print_text(f"Saved after step {report.num_steps}. Next: {_resume(report.output)}")
        return
    ended = "trained, ended by --patience" if report.stopped_by_patience else "trained"
    print_table(f"{report.output}: {ended}", rows)
    if report.best_model:
        print_text(f"The policy of the best evaluation is in {report.best_model}.")
    if report.resolved["num_eval_pairs"] and not report.resolved["eval_pairs"]:
        print_text(
            f"The held-out pairs are a share of {report.resolved['pairs']}. `dpo-cache eval` takes whole "
            "pair sets, so it does not measure on them again."
        )
    print_text(f"The model is in {report.model}, one line a step in {report.output}/metrics.jsonl. Next:")
    if pairs := report.resolved["eval_pairs"]:
        place = ("--cache", report.resolved["cache"], "--pairs", pairs)
        model = ("--model", str(report.model))
        print_text(f"  {command_line('eval', *place, *model, *loss_arguments(options))}")
    kind = report.resolved.get("auto_class", "AutoModelForCausalLM")
    print_text(f'  {kind}.from_pretrained("{report.model}")')


def _print_dry_run(report: TrainReport) -> None:
    resolved = report.resolved
    names = ("device", "precision", "attention", "gradient_checkpointing", "budget_tokens")
    rows = [
        ("policy", str(resolved["model"])),
        ("pairs", f"{resolved['pairs']}, {count(report.num_pairs)}"),
        _trained(report),
        *((name.replace("_", " "), str(resolved[name])) for name in names),
        (f"{_evaluation(report)} pairs".replace("held out", "held-out"), count(resolved["num_eval_pairs"])),
        ("steps", count(resolved["total_steps"])),
        ("learning rate", f"{resolved['lr']:g}"),
    ]
    if last := report.last:
        took = f"{last['num_pairs'] / last['pairs_per_s']:.1f} s for {last['num_pairs']} pairs"
        rows.append(("a step on the longest pairs", took))
    if following := next_preset(_placement(str(resolved.get("memory", "fast")))):
        rows.append(("less memory", f"--memory {following}; `dpo-cache plan` predicts how much less"))
    rows += forecast_rows(report.forecast)
    print_table(f"{report.output}: a dry run", rows)
    print_text("Nothing was written. Next: the same command without --dry-run.")


def _evaluation(report: TrainReport) -> str:
    """The name of the evaluation pairs: held out only if the run trains on none of them."""
    return evaluation_name({"resolved": report.resolved})


def _placement(memory: str) -> Placement:
    """The placement of a preset, or of entries."""
    found = placement_of(memory) if memory in PRESETS else placement_of("auto", memory, is_adapted=True)
    assert found is not None
    return found


def _stopped_at_once(output: str, checkpoints: list[Path]) -> str:
    if checkpoints:
        return f"{checkpoints[-1]} has the last state that was saved. Next: {_resume(output)}"
    return (
        "before the first checkpoint, so nothing is kept. Next: the same command; --save-every N saves "
        "earlier."
    )


def _resume(output: str) -> str:
    return command_line("train", "--resume", output)


def _trained(report: TrainReport) -> tuple[str, str]:
    return "parameters trained", f"{count(report.num_trained)} of {count(report.num_parameters)}"
