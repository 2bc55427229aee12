"""The notebooks as they are stored: run from the top, without errors, small, and without this machine's paths."""

from pathlib import Path

import nbformat
import pytest

from tests.example_notebooks.execute import HUB_ORGANIZATION, NOTEBOOKS, ROOT, code_cells

MOST_BYTES = 60_000


def test_there_are_three() -> None:
    assert [Path(name).stem for name in NOTEBOOKS] == ["quickstart", "lora_beta_sweep", "own_loop_and_trl"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_outputs_are_from_one_run_without_errors(name: str) -> None:
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored_is_small_and_of_no_machine(name: str) -> None:
    text = (ROOT / name).read_text()
    assert len(text.encode()) < MOST_BYTES
    assert not [place for place in ("/tmp", "/home", "/work", "/root", "site-packages") if place in text]
    assert f"{HUB_ORGANIZATION}/SmolLM2-135M-Instruct" in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_to_files(name: str) -> None:
    notebook = nbformat.read(ROOT / name, as_version=4)
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [part.split(")")[0] for part in texts.split("](")[1:]]
    assert links and [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_reports_are_shown_as_html() -> None:
    """What the notebooks are there to show: bars and tables, in outputs that replace each other."""
    shown = {}
    for name in NOTEBOOKS:
        for cell in code_cells(nbformat.read(ROOT / name, as_version=4)):
            pages = ["".join(output.data.get("text/html", "")) for output in cell.outputs if "data" in output]
            for call in ("precompute", "open_cache", "pairs(", "train(", "evaluate", "plan", "sweep("):
                if f".{call}" in cell.source:
                    shown.setdefault(call, []).append(sum("dpo-cache" in page for page in pages))
    assert max(shown["precompute"]) == max(shown["train("]) == max(shown["evaluate"]) == 2  # bar and report
    assert max(shown["sweep("]) == 2 and max(shown["plan"]) == max(shown["open_cache"]) == 1
