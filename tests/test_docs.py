"""The README names every command, and the lists of the docs are those of the code."""

import re
from pathlib import Path

import dpo_cache
from dpo_cache.cli.app import COMMANDS
from dpo_cache.losses.table import LOSSES
from tests.cli.write_help import options_page

ROOT = Path(dpo_cache.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_page_of_options_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == options_page(), (
        "run `python -m tests.cli.write_help`"
    )


def test_every_loss_has_its_line_in_the_docs() -> None:
    lines = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "losses.md").read_text(), re.M)
    assert sorted(lines) == sorted(LOSSES)


def test_every_command_is_shown() -> None:
    for command in ("precompute", "train"):
        assert f"dpo-cache {command} --" in README
    for command in COMMANDS:
        assert f"(docs/commands/{command}.md)" in README


def test_the_version_is_one() -> None:
    assert f'version = "{dpo_cache.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {dpo_cache.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_functions_are_documented() -> None:
    for name in dpo_cache.__all__:
        assert getattr(dpo_cache, name).__doc__, name
