"""`dpo-cache push`."""

from __future__ import annotations

from dpo_cache.cli.copying import copy
from dpo_cache.cli.output import command_line
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import PushOptions


@command(PushOptions, json_help="Print the report as JSON.")
def push_command(options: PushOptions, as_json: bool) -> None:
    """Copy a local cache, or some of it, into a remote one: only what is missing there, each file checked.

    An interrupted push resumes: give the same command again.
    """
    report = copy(options, options.local, options.remote, verb="pushing", as_json=as_json)
    if not as_json:
        print(
            f"{report.target} holds the copy. Next, on another machine:\n"
            f"  {command_line('pull', report.target, 'LOCAL')}"
        )
