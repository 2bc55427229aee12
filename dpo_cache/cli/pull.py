"""`dpo-cache pull`."""

from __future__ import annotations

from dataclasses import asdict

from dpo_cache.cli.following import following_lines
from dpo_cache.cli.output import (
    SAME_COMMAND,
    command_line,
    print_json,
    print_text,
    print_transfer,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import PullOptions


@command(PullOptions)
def pull_command(options: PullOptions, as_json: bool) -> None:
    """Copy a remote cache, or some of it, into a local folder: only what is missing there, each file checked.

    An interrupted pull resumes: give the same command again.
    """
    when_stopped(f"the files that were copied stay. {SAME_COMMAND}")
    from dpo_cache.upkeep import pull

    report = pull(**asdict(options), progress=True)
    if as_json:
        print_json(asdict(report))
        return
    print_transfer(report)
    cache, pair_sets = report.target, report.pair_sets
    following = following_lines(cache, pair_sets) or [command_line("ls", cache)]
    print_text(f"{cache} holds the copy. Next:\n  {following[0]}")
