"""`dpo-cache`: collects the commands, and turns errors into one message and an exit code.

Exit codes: 0 success, 1 `DpoCacheError`, 2 usage, 130 interrupted (143 by SIGTERM); what was published
is kept.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from dpo_cache.cli.compact import compact_command
from dpo_cache.cli.diff import diff_command
from dpo_cache.cli.eval_ import eval_command
from dpo_cache.cli.export import export_command
from dpo_cache.cli.gc import gc_command
from dpo_cache.cli.import_ import import_command
from dpo_cache.cli.ls import ls_command
from dpo_cache.cli.merge import merge_command
from dpo_cache.cli.output import remark, with_flags
from dpo_cache.cli.parameters import command_class
from dpo_cache.cli.precompute import precompute_command
from dpo_cache.cli.process import process_settings
from dpo_cache.cli.pull import pull_command
from dpo_cache.cli.push import push_command
from dpo_cache.cli.rm import rm_command
from dpo_cache.cli.signals import Interrupted, StoppedEarly, Terminated, Unwinding
from dpo_cache.cli.sweep import sweep_command
from dpo_cache.cli.train import train_command
from dpo_cache.cli.verify import verify_command
from dpo_cache.errors import DpoCacheError, OptionError

app = typer.Typer(
    name="dpo-cache",
    help="Score a frozen reference model once; train preference-tuned policies from the stored log-probs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "precompute": precompute_command,
    "train": train_command,
    "eval": eval_command,
    "sweep": sweep_command,
    "ls": ls_command,
    "verify": verify_command,
    "compact": compact_command,
    "gc": gc_command,
    "merge": merge_command,
    "diff": diff_command,
    "rm": rm_command,
    "pull": pull_command,
    "push": push_command,
    "export": export_command,
    "import": import_command,
}
for name, invoke in COMMANDS.items():
    app.command(name, cls=command_class(invoke))(invoke)


def command_names() -> list[str]:
    """Every command, in the order of the help."""
    return list(COMMANDS)


def _version(value: bool) -> None:
    if value:
        from dpo_cache import __version__

        print(f"dpo-cache {__version__}")
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
    print(f"error: {with_flags(message)}", file=sys.stderr)
    sys.exit(code)
