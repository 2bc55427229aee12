"""`dpo-cache pull`."""

from __future__ import annotations

from dpo_cache.cli.copying import copy, train_hint
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import PullOptions


@command(PullOptions, json_help="Print the report as JSON.")
def pull_command(options: PullOptions, as_json: bool) -> None:
    """Copy a remote cache, or some of it, into a local folder: only what is missing there, each file checked.

    An interrupted pull resumes: give the same command again.
    """
    report = copy(options, options.remote, options.local, verb="pulling", as_json=as_json)
    if not as_json:
        print(f"{report.target} holds the copy. Next:\n  {train_hint(report.target, report)}")
