"""Runs notebooks in a fresh copy of examples/, and compares their outputs with those that they show."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.documents.folder import ROOT, Workplace

# The quickstart comes first: the others find its pairs in the cache.
NOTEBOOKS = sorted(
    (str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.ipynb")),
    key=lambda name: ("quickstart" not in name, name),
)
CELL_S = 900  # the limit of a cell
HUB_ORGANIZATION = "HuggingFaceTB"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's warning where ipywidgets is missing
}
# On stderr: warnings of other libraries, which are neither stored nor a problem.
WARNINGS = re.compile(
    r"^((?!\S*dpo_cache/)\S+:\d+: \w*Warning: .*|\[transformers\] .*|  warnings\.warn\(.*|  super\(\).*"
    r"|Failed to load CPU gemm_4bit_forward .*)$\n?",  # bitsandbytes on some CPUs, imported by TRL
    re.M,
)


@contextmanager
def examples(model: str = "") -> Iterator[Path]:
    """A fresh copy of examples/ with a tiny model, or with the model in a folder."""
    with TemporaryDirectory() as path, TemporaryDirectory() as kept:
        folder = Workplace(Path(path).resolve(), Path(kept), lambda _: None, model).fresh([])
        (folder / "examples" / HUB_ORGANIZATION).symlink_to(folder / HUB_ORGANIZATION)
        yield folder / "examples"


def run(name: str, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a run in the folder. Raises `CellExecutionError` where a cell fails."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    os.environ.update(ENVIRONMENT)
    client = NotebookClient(
        notebook,
        timeout=CELL_S,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the versions of this machine
    places = (f"{folder}/", f"{folder.parent}/")
    for cell in code_cells(notebook):
        cell.outputs = [_without_places(output, places) for output in cell.outputs if not _is_warning(output)]
    return notebook


def problems(name: str, notebook: NotebookNode) -> list[str]:
    """The differences between the stored notebook and a run of it, by cell."""
    stored = nbformat.read(ROOT / name, as_version=4)
    found = []
    for number, (cell, before) in enumerate(zip(code_cells(notebook), code_cells(stored), strict=True), 1):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                found.append(f"{name}: cell [{number}] writes to stderr:\n{output.text}")
        if kinds(cell) != kinds(before):
            found.append(f"{name}: cell [{number}] shows {kinds(before)}, and a run gives {kinds(cell)}")
    return found


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> list[str]:
    """The kinds of a cell's outputs: stdout, or the richest type of a value."""
    return [output.name if output.output_type == "stream" else min(output.data) for output in cell.outputs]


def _is_warning(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" and not WARNINGS.sub("", output.text).strip()


def _without_places(output: NotebookNode, places: tuple[str, ...]) -> NotebookNode:
    """The output with paths from examples/ in place of those of the scratch folder."""
    text = json.dumps(output)
    for place in places:
        text = text.replace(place, "")
    return nbformat.from_dict(json.loads(text))


def save(name: str, notebook: NotebookNode) -> None:
    nbformat.write(notebook, ROOT / name)
