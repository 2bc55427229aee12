"""Every command has a page in docs/commands that shows a run and its help. `tests/documents` compares both."""

import pytest
from typer.testing import CliRunner

from dpo_cache.cli.app import COMMANDS, app
from tests.cli.write_help import OPTIONS, PAGES, options_page, read_helps, with_help


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return read_helps()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_shows_a_run_and_the_help(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    assert page.startswith(f"# dpo-cache {name}\n")
    shown = [line for line in page.splitlines() if line.startswith(f"$ dpo-cache {name} ")]
    examples = [line for line in shown if not line.endswith("--help")]
    assert examples, f"docs/commands/{name}.md shows no run of `dpo-cache {name}` and what it prints"
    assert len(shown) == len(examples) + 1


def test_no_page_is_left_of_a_command_that_is_gone() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(COMMANDS)


def test_the_page_of_options_has_every_command() -> None:
    assert set(OPTIONS) == set(COMMANDS)
    page = options_page()
    for name in COMMANDS:
        assert f"\n## {name}\n\n[The command](commands/{name}.md)." in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in rows)  # three cells
    assert "\n| `KIND` | needed |" in page and "\n| `CACHE` or `--cache` | needed |" in page
    sweep = page.partition("\n## sweep\n")[2].partition("\n## ")[0]
    assert "`--jobs`" in sweep and "`--lr`" not in sweep


def test_help_is_plain_text_of_fixed_width(helps: dict[str, str]) -> None:
    for name, text in helps.items():
        assert f"Usage: dpo-cache {name} " in text
        assert "\x1b" not in text and max(map(len, text.splitlines())) <= 100


def test_a_switch_shows_no_type(helps: dict[str, str]) -> None:
    """It takes no value."""
    root = CliRunner().invoke(app, ["--help"], prog_name="dpo-cache").stdout
    assert "--version" in root and "--json" in helps["ls"] and "--shuffle" in helps["sweep"]
    assert not [name for name, text in {**helps, "": root}.items() if "bool" in text]


def test_a_block_is_renewed_in_place() -> None:
    page = "# dpo-cache ls\n\n```console\n$ dpo-cache ls --help\nold\n\nlines\n```\n\nafter\n\n```\n$ dpo-cache ls CACHE\n```\n"
    renewed = with_help(page, "ls", "new")
    assert (
        renewed
        == "# dpo-cache ls\n\n```console\n$ dpo-cache ls --help\nnew\n```\n\nafter\n\n```\n$ dpo-cache ls CACHE\n"
        "```\n"
    )
    assert with_help(renewed, "ls", "new") == renewed
    with pytest.raises(ValueError, match="found 0"):
        with_help(page, "rm", "new")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_in_the_list_of_commands_is_one_line(name: str) -> None:
    summary = (COMMANDS[name].__doc__ or "").partition("\n\n")[0]
    assert summary.endswith(".") and "\n" not in summary
