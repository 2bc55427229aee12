"""`dpo-cache`: collects the commands, and turns errors into one message and an exit code.

Exit codes: 0 success, 1 `DpoCacheError`, 2 usage, 130 interrupted (143 by SIGTERM); what was published
is kept.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from dpo_cache.cli import (
    compact,
    diff,
    eval_,
    export,
    gc,
    import_,
    ls,
    merge,
    plan,
    precompute,
    pull,
    push,
    rm,
    sweep,
    train,
    verify,
)
from dpo_cache.cli.failures import UsageError, fail, print_error, usage_message, wants_json
from dpo_cache.cli.output import output_of_one_command, print_text, remark, stop_note
from dpo_cache.cli.parameters import command_class, without_types_of_switches
from dpo_cache.cli.process import process_settings
from dpo_cache.cli.signals import Interrupted, StoppedEarly, Terminated, Unwinding
from dpo_cache.errors import DpoCacheError, OptionError, OtherRankError
from dpo_cache.training.launch import is_quiet_rank, launched_rank, reports_early_errors


class Commands(TyperGroup):
    """The commands together."""

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types_of_switches(super().get_params(ctx))


app = typer.Typer(
    name="dpo-cache",
    cls=Commands,
    help="Score a frozen reference model once; train preference-tuned policies from the stored log-probs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "plan": plan.plan_command,
    "precompute": precompute.precompute_command,
    "train": train.train_command,
    "eval": eval_.eval_command,
    "sweep": sweep.sweep_command,
    "ls": ls.ls_command,
    "verify": verify.verify_command,
    "compact": compact.compact_command,
    "gc": gc.gc_command,
    "merge": merge.merge_command,
    "diff": diff.diff_command,
    "rm": rm.rm_command,
    "pull": pull.pull_command,
    "push": push.push_command,
    "export": export.export_command,
    "import": import_.import_command,
}
for name, invoke in COMMANDS.items():
    app.command(name, cls=command_class(invoke))(invoke)


def _version(value: bool) -> None:
    if value:
        from dpo_cache.cli.versions import version_lines

        for line in version_lines():
            print_text(line)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_version,
        is_eager=True,
        help="Print the versions of dpo-cache and of the libraries it runs on, and exit.",
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line and exit."""
    words = sys.argv[1:]
    invoke = COMMANDS.get(words[0]) if words else None
    with output_of_one_command(getattr(invoke, "options_class", None)):
        _main(words)


def _main(words: list[str]) -> NoReturn:
    trains = words[:1] == ["train"]  # one of several processes, if a launcher has started them
    is_quiet, as_json = trains and is_quiet_rank(), wants_json(words)
    try:
        is_rank = trains and launched_rank() is not None
        with process_settings(is_rank=is_rank, is_quiet=is_quiet), Unwinding(remark):
            code = app(prog_name="dpo-cache", standalone_mode=False)
    except UsageError as error:
        if not words:  # typer has printed the help
            sys.exit(2)
        fail("UsageError", usage_message(error, words), 2, as_json=as_json, is_quiet=is_quiet)
    except OtherRankError as error:
        sys.exit(error.code)
    except DpoCacheError as error:
        is_reported = trains and error.rank is None and not reports_early_errors()
        code = 2 if isinstance(error, OptionError) else 1
        fail(type(error).__name__, str(error), code, as_json=as_json, is_quiet=is_reported)
    except Terminated:
        message = f"terminated: {stop_note()}"
        fail("Terminated", message, 143, as_json=as_json, is_quiet=is_quiet, prefix="")
    except Interrupted:
        message = f"interrupted: {stop_note()}"
        fail("Interrupted", message, 130, as_json=as_json, is_quiet=is_quiet, prefix="")
    except StoppedEarly as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if as_json and not is_quiet:
            print_error(type(error).__name__, str(error), 1)
        raise
    sys.exit(code or 0)
