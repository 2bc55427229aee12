"""`dpo-cache push`."""

from __future__ import annotations

from dataclasses import asdict

from dpo_cache.cli.output import (
    SAME_COMMAND,
    command_line,
    print_json,
    print_text,
    print_transfer,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import PushOptions


@command(PushOptions)
def push_command(options: PushOptions, as_json: bool) -> None:
    """Copy a local cache, or some of it, into a remote one: only what is missing there, each file checked.

    An interrupted push resumes: give the same command again.
    """
    when_stopped(f"the files that were copied stay. {SAME_COMMAND}")
    from dpo_cache.upkeep import push

    report = push(**asdict(options), progress=True)
    if as_json:
        print_json(asdict(report))
        return
    print_transfer(report)
    following = command_line("pull", options.remote, "LOCAL")
    is_folder = options.remote.startswith("file:")
    reader = "on a machine that has this folder" if is_folder else "on another machine"
    print_text(f"{report.target} holds the copy. Next, {reader}:\n  {following}")
