"""`dpo-cache`: collects the commands, and turns errors into one message and an exit code.

Exit codes: 0 success, 1 `DpoCacheError`, 2 usage, 130 interrupted (143 by SIGTERM); what was published
is kept.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

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
from dpo_cache.cli.output import print_text, remark
from dpo_cache.cli.parameters import command_class
from dpo_cache.cli.process import process_settings
from dpo_cache.cli.signals import Interrupted, StoppedEarly, Terminated, Unwinding
from dpo_cache.errors import DpoCacheError, OptionError, OtherRankError
from dpo_cache.training.launch import is_quiet_rank, launched_rank, reports_early_errors

app = typer.Typer(
    name="dpo-cache",
    help="Score a frozen reference model once; train preference-tuned policies from the stored log-probs.",
    no_args_is_help=True,
    add_completion=False,
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
        from dpo_cache import __version__

        print_text(f"dpo-cache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line and exit."""
    trains = sys.argv[1:2] == ["train"]  # with other processes, if a launcher has started several
    is_quiet = trains and is_quiet_rank()
    try:
        is_rank = trains and launched_rank() is not None
        with process_settings(is_rank=is_rank, is_quiet=is_quiet), Unwinding(remark):
            app()
    except OtherRankError as error:
        sys.exit(error.code)
    except DpoCacheError as error:
        is_reported = trains and error.rank is None and not reports_early_errors()
        _fail(str(error), 2 if isinstance(error, OptionError) else 1, is_quiet=is_reported)
    except Terminated:
        _fail("terminated; everything published so far is kept.", 143, is_quiet=is_quiet)
    except Interrupted:
        _fail("interrupted; everything published so far is kept.", 130, is_quiet=is_quiet)
    except StoppedEarly as stop:
        sys.exit(stop.exit_code)


def _fail(message: str, code: int, *, is_quiet: bool) -> NoReturn:
    if not is_quiet:
        remark(f"error: {message}")
    sys.exit(code)
