"""The rules of the package's docstring, on pages written here."""

from pathlib import Path

import pytest

from tests.documents import pages
from tests.documents.accepted import check_accepted, shown_command
from tests.documents.blocks import PageError, read_blocks, read_commands, starts_with
from tests.documents.compare import difference, matched, renewed
from tests.documents.execute import run_command
from tests.documents.folder import SHOWN_AS, Workplace
from tests.documents.pages import Page

PAGE = """\
<!-- starts with: cache, run -->

- in a list

  ```console
  $ dpo-cache ls \\
      cache
  one

  two
  $ ls
  ```

<!-- not run: needs a GPU -->
```sh
# a remark
dpo-cache train cache --output run --launch 8
```

```python
print(1)
```

```text
1
```

<!--
```sh
mkdir hidden
```
-->
"""


def test_blocks_and_commands_of_a_page() -> None:
    console, unrun, code, output, hidden = read_blocks(PAGE)
    assert starts_with(PAGE) == ["cache", "run"]
    first, second = read_commands(console)
    assert (first.text, first.number) == ("dpo-cache ls cache", 6)
    assert (first.output, first.output_number) == (["one", "", "two"], 8)
    assert (second.text, second.output) == ("ls", [])
    assert unrun.not_run == "a GPU" and not code.not_run and output.is_output and not code.is_output
    assert [command.text for command in read_commands(unrun)] == [
        "dpo-cache train cache --output run --launch 8"
    ]
    assert [command.text for command in read_commands(hidden)] == ["mkdir hidden"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```\nx\n```", "a block in ``"),
        ("```bash\nls\n```", "a block in `bash`"),
        ("```text\n$ dpo-cache ls cache\n```", "a command in a block of `text`"),
        ("```json\ndpo-cache ls cache\n```", "a command in a block of `json`"),
        ("```sh\nls", "does not end"),
        ("<!-- not run: needs patience -->\n", "`needs patience` is none of"),
    ],
)
def test_a_page_that_breaks_the_rules_is_refused(page: str, message: str) -> None:
    with pytest.raises(PageError, match=message):
        read_blocks(page)


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        ("loss 0.6931  accuracy 87.5%  margin +0.1538", "loss 1  accuracy -  margin -2e-5"),
        ("written   108.8 kB in 3 min 34 s", "written 1.2 MB in 0.4 s"),
        ("c9f20fef24d6  4 -> 1", "0123456789ab  12 -> 3"),
        ("references/c9f20fef24d6f1de090b/scores", "references/11f20fef24d6f1de0900/scores"),
        ("made 2026-11-29T01:10:42+00:00", "made 2027-01-01T11:00:00+00:00"),
        ("╭─ Options ───╮", "╭─ Options ─────╮"),
    ],
)
def test_lines_that_differ_in_numbers_are_the_same(shown: str, real: str) -> None:
    assert matched([shown], [real]) == [0]


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        ("3 pairs", "3 rows"),
        ("float32", "float16"),
        ("loss 1", "loss 1  margin 2"),
        ("by prompt", "by prompts"),
    ],
)
def test_other_lines_are_not(shown: str, real: str) -> None:
    assert matched([shown], [real]) is None


def test_three_dots_match_any_lines() -> None:
    real = ["a 1", "b", "c", "d 2"]
    assert matched(["a 9", "...", "d 9"], real) == [0, None, 3]
    assert matched(["...", "c", "..."], real) == [None, 2, None]
    assert matched(["...", "d 7"], real) == [None, 3]
    assert matched(["a 0", "..."], real) == [0, None]
    assert matched(["a 0", "...", "a 1", "..."], real) is None
    assert matched(["...", "c"], real) is None and matched(["b", "..."], real) is None
    assert matched(["a 1", "b", "c"], real) is None
    assert renewed(["a 9", "...", "d 9"], real) == ["a 1", "...", "d 2"]
    assert renewed(["x", "..."], real) == real


def test_a_diff_shows_only_the_lines_that_are_others() -> None:
    lines = difference(["loss 1", "saved", "a", "b", "c"], ["loss 2", "stored", "a", "b", "c"]).splitlines()
    assert lines == ["@@", "  loss 1", "- saved", "+ stored", "  a", "  b"]


def test_a_command_runs_with_or_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "say.py").write_text("import sys; print(sys.argv[1]); sys.exit('no more')")
    assert run_command("python say.py word") == (1, "word\nno more\n")
    assert run_command("echo one; echo two >&2; exit 3") == (3, "one\ntwo\n")
    done = run_command("dpo-cache ls nowhere  # exit code 1")
    assert done.code == 1 and done.output.startswith("error: nowhere: no dpo-cache here")
    assert "Usage: dpo-cache ls" in run_command("dpo-cache ls --help").output


def run_page(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "kept" / "base").mkdir(parents=True)
    monkeypatch.setattr(Workplace, "_fill_base", lambda *_: None)
    page = Page("page.md")
    page.run(Workplace(tmp_path / "folder", tmp_path / "kept", lambda _: None))
    return page


def test_a_page_gets_the_output_of_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "- a list\n\n  ```console\n  $ pwd\n  ?\n\n  $ echo 1\n  2\n  ```\n\n"
        "```python\nprint('now')\n```\n\n```text\nthen\n```\n"
    )
    page = run_page(text, tmp_path, monkeypatch)
    assert [problem.splitlines()[0] for problem in page.problems] == [
        "page.md:4: pwd",
        "page.md:16: the code above",
    ]
    pwd, code = text.replace("?", SHOWN_AS), text.replace("then", "now")
    both = pwd.replace("then", "now")
    assert page.renewed(everything=False) == both != code
    assert page.renewed(everything=True) == both.replace("  2\n", "  1\n")
    path = tmp_path / "page.md"
    path.write_text(f"# Edited meanwhile\n\n{text}")
    page.write(everything=False)
    assert path.read_text() == f"# Edited meanwhile\n\n{both}"


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("```sh\nexit 2\n```", "page.md:2: exit 2\nexit code 2"),
        ("```console\n$ exit 2  # exit code 1\n```", "page.md:2: exit 2  # exit code 1\nexit code 2"),
        ("```python\n\nnothing\n```", "page.md:2: this code fails:\n"),
        (
            "<!-- not run: needs S3 -->\n```sh\ndpo-cache ls --no\n```",
            "page.md:3: dpo-cache ls --no\nis not accepted: NoSuchOption",
        ),
        (
            "<!-- not run: needs S3 -->\n```python\na b\n```",
            "page.md:3: this code\nis not accepted: SyntaxError",
        ),
        ("<!-- starts with: nothing -->", "page.md: starts with: nothing: none of"),
    ],
)
def test_a_problem_names_page_line_and_command(
    block: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = run_page(block, tmp_path, monkeypatch).problems
    assert found.startswith(problem)


def test_a_command_that_fails_as_shown_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "```console\n$ echo error: no; exit 2\nerror: no\n\n$ exit 3  # exit code 3\n\n$ echo 1\n```\n"
    assert not run_page(text, tmp_path, monkeypatch).problems


@pytest.mark.parametrize(
    "command",
    [
        "dpo-cache train cache --output run",
        "CUDA_VISIBLE_DEVICES=0 dpo-cache train cache --output run",
        "torchrun --nproc-per-node 8 -m dpo_cache train cache --output run",
        "accelerate launch --num_processes 8 -m dpo_cache train cache --output run  # by accelerate",
        "srun dpo-cache train cache --output run",
        'ray exec cluster.yaml --stop "dpo-cache train cache --output run"',
    ],
)
def test_commands_are_found_behind_a_launcher(command: str) -> None:
    assert shown_command(command) == ["train", "cache", "--output", "run"]
    check_accepted(command)
    with pytest.raises(Exception, match="No such option: --nothing"):
        check_accepted(command.replace("--output run", "--output run --nothing"))
