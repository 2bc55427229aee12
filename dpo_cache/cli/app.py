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
from dpo_cache.errors import DpoCacheError, OptionError

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
    try:
        with process_settings(), Unwinding(remark):
            app()
    except OptionError as error:
        _fail(str(error), 2)
    except DpoCacheError as error:
        _fail(str(error), 1)
    except Terminated:
        _fail("terminated; everything published so far is kept.", 143)
    except Interrupted:
        _fail("interrupted; everything published so far is kept.", 130)
    except StoppedEarly as stop:
        sys.exit(stop.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    remark(f"error: {message}")
    sys.exit(code)
