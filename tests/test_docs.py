"""The README names every command and option, and its lists are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.loss_names import LOSSES
from dpo_cache.options import PrecomputeOptions, flag_of
from dpo_cache.train_options import TrainOptions

ROOT = Path(dpo_cache.__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("options", [PrecomputeOptions, TrainOptions])
def test_the_table_of_options_is_that_of_the_code(options: type) -> None:
    for entry in fields(options):
        flag, default = flag_of(entry), entry.default
        row = re.search(rf"^\| `{re.escape(flag)}\b(?:[^|]|\\\|)*\| ([^|]*)\|([^|]*)\|$", README, re.M)
        assert row, f"{flag} is not in the README"
        if isinstance(default, (str, int, float)) and not isinstance(default, bool) and default != "":
            assert f"`{default}`" in row.group(1), f"{flag}: the README's default is not {default}"


def test_every_loss_has_its_line_in_the_docs() -> None:
    lines = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "losses.md").read_text(), re.M)
    assert sorted(lines) == sorted(LOSSES)
    row = next(line for line in README.splitlines() if line.startswith("| `--loss`"))
    assert ", ".join(LOSSES) in row


def test_every_command_is_shown() -> None:
    for command in ("precompute", "train"):
        assert f"dpo-cache {command} --" in README


def test_the_version_is_one() -> None:
    assert f'version = "{dpo_cache.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {dpo_cache.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_functions_are_documented() -> None:
    for name in dpo_cache.__all__:
        assert getattr(dpo_cache, name).__doc__, name
