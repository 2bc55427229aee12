"""What counts as a problem of a notebook."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.example_notebooks import execute
from tests.example_notebooks.execute import kinds, problems

BAR = "Writing model shards: 100%|██████████| 1/1 [00:00<00:00, 196.21it/s]\n"
WARNING = (
    "/venv/lib/python3.11/site-packages/x/args.py:15: FutureWarning: `a` is deprecated.\n"
    "  warnings.warn(message, FutureWarning)\n"
)


def cell(*outputs: dict) -> nbformat.NotebookNode:
    return new_code_cell("1", outputs=[nbformat.from_dict(output) for output in outputs])


def value(**data: str) -> dict:
    return new_output("execute_result", {name.replace("_", "/"): text for name, text in data.items()})


def test_a_value_counts_by_its_richest_type() -> None:
    html = value(text_plain="<Report>", text_html="<b>Report</b>")
    printed = new_output("stream", name="stdout", text="a")
    assert kinds(cell(html, value(text_plain="1"), printed)) == ["text/html", "text/plain", "stdout"]


def found(tmp_path, monkeypatch: pytest.MonkeyPatch, before: list[dict], after: list[dict]) -> list[str]:
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    nbformat.write(new_notebook(cells=[cell(*before)]), tmp_path / "a.ipynb")
    return problems("a.ipynb", new_notebook(cells=[cell(*after)]))


def test_other_values_of_the_same_kind_are_no_problem(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(tmp_path, monkeypatch, [value(text_plain="1")], [value(text_plain="2")]) == []


def test_other_kinds_are_a_problem(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    html = value(text_plain="1", text_html="<b>1</b>")
    (problem,) = found(tmp_path, monkeypatch, [html], [value(text_plain="1")])
    assert problem == "a.ipynb: cell [1] shows ['text/html'], and a run gives ['text/plain']"


def test_a_bar_of_another_library_is_a_problem(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = new_output("stream", name="stderr", text=BAR)
    assert any("writes to stderr" in problem for problem in found(tmp_path, monkeypatch, [], [bar]))


@pytest.mark.parametrize(
    ("text", "is_warning"),
    [
        (WARNING, True),
        (WARNING + BAR, False),
        ("[transformers] The tokenizer has new tokens.\n", True),
        ("/home/me/dpo_cache/store/cache.py:1: UserWarning: our own.\n", False),
    ],
)
def test_warnings_of_other_libraries_are_left_out(text: str, is_warning: bool) -> None:
    assert execute._is_warning(new_output("stream", name="stderr", text=text)) == is_warning
