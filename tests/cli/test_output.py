"""Short by default, whole with --verbose."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from dpo_cache.cli import output
from dpo_cache.cli.app import COMMANDS, app
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import LsOptions


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_verbose(name: str) -> None:
    assert "--verbose" in CliRunner().invoke(app, [name, "--help"]).stdout


@pytest.mark.parametrize("is_verbose", [True, False])
def test_a_command_knows_whether_it_is_verbose(is_verbose: bool) -> None:
    seen = []
    invoke = command(LsOptions)(lambda options, as_json: seen.append(output.is_verbose()))

    class Context:
        meta: ClassVar[dict[str, Any]] = {}

        def get_parameter_source(self, name: str) -> None:
            return None

    invoke(cache="c", name=None, as_json=False, verbose=is_verbose, context=Context())
    assert seen == [is_verbose] and output.is_verbose() is False
