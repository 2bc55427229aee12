"""The README names every command, and the lists of the docs are those of the code."""

import re
from pathlib import Path

import pytest
import typer

import dpo_cache
from dpo_cache.cli.app import COMMANDS, app
from dpo_cache.losses.table import LOSSES
from tests.cli.write_help import options_page
from tests.documents.pages import PAGES

ROOT = Path(dpo_cache.__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLAG = r"(?<![\w-])--[a-z][\w-]*"
FLAGS = {
    name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}


def test_the_page_of_options_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == options_page(), (
        "run `python -m tests.cli.write_help`"
    )


def test_every_loss_has_its_line_in_the_docs() -> None:
    lines = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "losses.md").read_text(), re.M)
    assert sorted(lines) == sorted(LOSSES)


def test_every_command_is_shown() -> None:
    for command in ("precompute", "train"):
        assert f"dpo-cache {command} " in README
    commands = (ROOT / "docs" / "commands.md").read_text()
    assert "(docs/commands" in README
    for command in COMMANDS:
        assert f"(commands/{command}.md)" in commands


@pytest.mark.parametrize("page", [page for page in PAGES if not re.search("coming-from|measurements", page)])
def test_options_that_a_text_names_are_options_of_its_command(page: str) -> None:
    """Blocks are run elsewhere. Two kinds of pages also name options of other tools and of benchmarks."""
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    of_all = set().union(*FLAGS.values())
    for code in re.findall(r"`([^`\n]+)`", text):
        named = re.match(r"dpo-cache ([a-z]+)\b", code)
        if named or code.startswith("--"):
            known = FLAGS.get(named[1], of_all) if named else of_all
            assert {*re.findall(FLAG, code)} <= {*known, "--help", "--version"}, f"{page}: `{code}`"


def test_the_version_is_one() -> None:
    assert f'version = "{dpo_cache.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {dpo_cache.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_functions_are_documented() -> None:
    for name in dpo_cache.__all__:
        assert getattr(dpo_cache, name).__doc__, name
