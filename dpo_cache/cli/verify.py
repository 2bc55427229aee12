"""`dpo-cache verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from dpo_cache.cli.output import (
    ProgressLine,
    command_line,
    count,
    format_bytes,
    print_json,
    print_table,
    print_text,
    when_stopped,
    with_flags,
)
from dpo_cache.cli.parameters import command
from dpo_cache.errors import DpoCacheError, printable
from dpo_cache.options.upkeep import VerifyOptions
from dpo_cache.progress import show_bytes

if TYPE_CHECKING:
    from dpo_cache.precomputing.rescore import RescoreReport
    from dpo_cache.store.upkeep.problems import VerifyReport
    from dpo_cache.store.upkeep.repair import RepairReport


@command(VerifyOptions)
def verify_command(options: VerifyOptions, as_json: bool) -> None:
    """Check every byte of a cache, and that its files agree with each other.

    The exit code is 1 if something is wrong. Reads every file; writes nothing without --repair.
    """
    from dpo_cache.planning.start import check_verify
    from dpo_cache.upkeep import add_rescored, check_files

    check_verify(options)
    if options.repair:
        when_stopped("some files may have been moved aside. Next: the same command.")
    with ProgressLine("verifying") as line:
        report = check_files(options, lambda done, total: show_bytes(line, done, total))
        try:
            add_rescored(report, options, line.remark)
        except DpoCacheError:
            if not report.is_whole:  # first print the problems and the moved files
                line.pause(lambda: _print(report, options, as_json=as_json))
            raise
    _print(report, options, as_json=as_json)
    if not report.is_whole or not all(entry.agrees for entry in report.rescored):
        raise typer.Exit(1)


def _print(report: VerifyReport, options: VerifyOptions, *, as_json: bool) -> None:
    if not as_json:
        _print_report(report, options.cache)
        return
    repaired = report.repair
    print_json(
        {
            **asdict(report),
            "whole": report.is_whole,
            "repair": {**asdict(repaired), "lost": repaired.lost} if repaired else None,
            "rescored": [{**asdict(entry), "agrees": entry.agrees} for entry in report.rescored],
        }
    )


def _print_report(report: VerifyReport, cache: str) -> None:
    rows = [("files", f"{count(report.files)} ({format_bytes(report.bytes)})")]
    if report.subset is not None:
        shown = f"{count(report.files_read)} ({format_bytes(report.bytes_read)})"
        rows.append(
            ("files read now", f"{shown}, about {100 * report.subset:.4g}% of all; the next run reads others")
        )
    rows += [
        ("references", count(report.references)),
        ("completions", count(report.completions)),
        ("pair sets", count(report.pair_sets)),
        ("pairs", count(report.pairs)),
        ("problems", count(len(report.problems))),
    ]
    if number := len(report.unreferenced):
        rows.append(("unreferenced files", f"{count(number)} (no damage; `dpo-cache gc` drops them)"))
    if report.unknown:
        shown = ", ".join(report.unknown[:3]) + (", …" if len(report.unknown) > 3 else "")
        rows.append(("files of no known kind", f"{count(len(report.unknown))} ({shown})"))
    print_table(f"{report.cache}: {_verdict(report)}", rows)
    for problem in report.problems:
        text = str(problem)
        if report.repair and "`repair`" in problem.remedy:  # done already
            text = text.removesuffix(f"\n  {problem.remedy}")
        print_text(with_flags(text))
    for entry in report.rescored:
        _print_rescored(entry)
    if report.repair:
        _print_repair(report.repair)
    elif report.problems and len(report.unreadable) == len(report.problems):
        print_text("Nothing is known to be damaged. Next: the same command, once all of it can be read")
    elif not report.is_whole:
        print_text(f"Nothing was changed. Next: {command_line('verify', cache, '--repair')}")
    elif all(entry.agrees for entry in report.rescored):
        which = "Every file" if report.subset is None else "Every file that was read"
        print_text(f"{which} of {report.cache} is what was written. Next: {command_line('ls', report.cache)}")


def _verdict(report: VerifyReport) -> str:
    if report.is_whole:
        return "whole" if report.subset is None else "whole, as far as it was read"
    return "damaged" if len(report.unreadable) < len(report.problems) else "not all of it could be read"


def _print_rescored(entry: RescoreReport) -> None:
    rows = [
        ("completions", f"{count(entry.completions)} ({count(entry.tokens)} tokens)"),
        ("largest gap", f"{entry.largest_gap:.2g} nats a token (allowed {entry.largest_allowed:g})"),
        ("mean gap", f"{entry.mean_gap:.2g} nats a token (allowed {entry.mean_allowed:g})"),
    ]
    if entry.together:
        rows.append(("all tokens together", entry.together))
    verdict = (
        "the live model agrees"
        if entry.agrees
        else f"THE LIVE MODEL DISAGREES, most on completion {entry.worst}"
    )
    print_table(f"reference {entry.reference[:12]}: {verdict}", rows)
    if not entry.agrees:
        print_text(
            "Its scores are stale or were made on a faulty machine: remove the reference with `dpo-cache "
            "rm` and score again."
        )


def _print_repair(repaired: RepairReport) -> None:
    for moved in repaired.moved:
        print_text(
            f"moved aside: {moved.file}\n  to {moved.to}"
            if moved.to
            else f"removed: {moved.file} (a link or a pipe: what it pointed to is not changed)"
        )
    for left in repaired.left:
        print_text(f"left: {left.file} ({left.why})")
    if not repaired.commands:
        print_text("No completions are to be scored again. Files that could not be read were not moved.")
        return
    lost = "an unknown number of" if repaired.lost is None else f"at most {count(repaired.lost)}"
    restored = (
        f"{count(repaired.restored)} completions were put back from pair sets; " if repaired.restored else ""
    )
    again = "no completion is" if repaired.lost == 0 else f"{lost} completions are"
    print_text(f"{restored}{again} to be scored again. Next:")
    for line in repaired.commands:
        print_text(f"  {printable(line)}")  # on one line, whatever names the cache's files contain
