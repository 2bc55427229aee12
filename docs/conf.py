"""The documentation site, built by `make docs`: Sphinx with furo, from the Markdown pages of this folder.

The source folder is the repository's root, so that a relative link means the same on the site and in a
code browser, also from README.md or to a file outside of docs. Links to pages and to headings are checked;
every warning is an error.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import dpo_cache  # noqa: E402

project = "dpo-cache"
copyright = "the dpo-cache authors, Apache-2.0"
version = release = dpo_cache.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/*/*.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
exclude_patterns = ["docs/_build", *(path.name for path in ROOT.iterdir() if path.is_dir() and path != DOCS)]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures; links between pages are not in this domain

myst_heading_anchors = 4  # an anchor for each heading, spelled as GitHub spells it
highlight_language = "text"

html_theme = "furo"
html_title = "dpo-cache"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

smartquotes = False  # quotes in Markdown are often code
default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 90

# Parts of the navigation, each with its pages. Every page is in one of them, or the build fails.
NAVIGATION = {
    "Start": ["why", "quickstart", "how-it-works", "when-not"],
    "Guides": [
        "guides/own-data",
        "guides/small-card",
        "guides/share-a-cache",
        "guides/resume",
        "guides/compare",
        "guides/sweep",
        "guides/several-gpus",
        "notebooks",
    ],
    "Coming from": ["coming-from-trl", "coming-from-original", "coming-from-open-instruct"],
    "Topics": [
        "data",
        "keys",
        "losses",
        "memory",
        "small-gpu",
        "scale",
        "training",
        "remote",
        "tracking",
        "families",
        "troubleshooting",
    ],
    "Reference": ["commands", "options", "python", "api", "format"],
    "Evidence": ["measurements", "negative-results"],
    "Project": ["README </README>", "/CHANGELOG", "/CONTRIBUTING", "/SECURITY"],
}


# The API reference, from docstrings. Names that are in no group are reports.
FUNCTIONS = ["precompute", "train", "evaluate", "sweep", "plan"]
LOOPS = ["training_batches", "TrainingBatch", "preference_loss"]
READING = ["open_cache", "Cache", "PairSet", "ScoredPair", "Pair", "Completion", "Score"]
READERS = {  # what a reader of a cache calls; the other methods publish and check
    "Cache": "references, find_reference, read_reference, pair_sets, pairs, holds_pairs",
    "PairSet": "name, reference_id, is_imported, has_token_logps, block_sizes, read_block, read_keys",
}
UPKEEP = ["verify", "compact", "merge", "push", "pull", "export_pairs", "import_pairs"]


def add_generated(_: Sphinx, docname: str, source: list[str]) -> None:
    """Append the tables of contents to two pages, and the reference to docs/api.md.

    They are not in the pages themselves, where a code browser would show them as blocks of code.
    """
    if docname == root_doc:
        source[0] += "".join(_toctree(caption, pages) for caption, pages in NAVIGATION.items())
    elif docname == "docs/commands":
        pages = sorted(path.stem for path in (DOCS / "commands").glob("*.md"))
        source[0] += _toctree("", [f"commands/{page}" for page in pages])
    elif docname == "docs/api":
        source[0] += "".join(_reference(title, names) for title, names in _groups().items())


def _toctree(caption: str, pages: list[str]) -> str:
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(
        ["\n", "```{toctree}", *options, "", *(page for page in pages if file_of(page).exists()), "```", ""]
    )


def file_of(entry: str) -> Path:
    """The page of an entry of the navigation: PAGE in docs, /PAGE of the repository, or TITLE <PAGE>."""
    name = entry.partition("<")[2].rstrip(">") or entry
    return (ROOT / name[1:] if name.startswith("/") else DOCS / name).with_suffix(".md")


def _groups() -> dict[str, list[str]]:
    errors = [name for name in dpo_cache.__all__ if name.endswith("Error")]
    grouped = {*FUNCTIONS, *LOOPS, *READING, *UPKEEP, *errors}
    return {
        "Score, train, compare": FUNCTIONS,
        "Read a cache": READING,
        "A loop of your own": LOOPS,
        "Maintain and exchange": UPKEEP,
        "Reports": [name for name in dpo_cache.__all__ if name not in grouped],
        "Errors": errors,
    }


def _reference(title: str, names: list[str]) -> str:
    lines = [f"\n## {title}\n", "```{eval-rst}", ".. currentmodule:: dpo_cache", ""]
    for name in names:
        if isinstance(getattr(dpo_cache, name), type):
            # the fields of a report are its result; an error has none
            members = [f"   :members: {READERS.get(name, '')}".rstrip(), "   :undoc-members:"]
            members = [] if name.endswith("Error") else members
            lines += [f".. autoclass:: {name}", *members, ""]
        else:
            lines += [f".. autofunction:: {name}", ""]
    return "\n".join([*lines, "```", ""])


def shorten_signature(
    _: Sphinx, what: str, __: str, described: Any, ___: object, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """`train(cache, output, *, on_metrics=None, **options)`: the docstring lists the options one by one.

    Classes have no signature here: none is built by hand, but a few that show their fields.
    """
    if what in ("class", "exception"):
        return "", result
    options = {match[1] for match in _OPTION.finditer(_options_of(described))}
    if not options:
        return signature, result
    kept = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(described).parameters.values()
        if parameter.name not in options
    ]
    keywords = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
    return str(inspect.Signature([*kept, keywords])), result


def mark_options(*event: Any) -> None:
    """A docstring's options fold up: their parts get titles, and `name: type = default` becomes a term.

    An indented example, as in Markdown, becomes a block of code.
    """
    lines = event[-1]
    for place in range(len(lines) - 1, 1, -1):
        before = next((line for line in lines[place - 1 :: -1] if line), "")
        if (
            lines[place].startswith("    ")
            and not lines[place - 1]
            and before[:1] not in ("", " ", ":", "-", ".")
        ):
            lines[place:place] = ["::", ""]
    if "Options:" in lines:
        first = lines.index("Options:")
        marked = [new for line in lines[first + 1 :] for new in _marked(line)]
        opening, closing = (
            [".. raw:: html", "", f"   {tag}", ""]
            for tag in ("<details><summary>Options</summary>", "</details>")
        )
        lines[first:] = [*opening, *marked, "", *closing]


def _marked(line: str) -> list[str]:
    if title := re.fullmatch(r"(\S.*):", line):
        return [f".. rubric:: {title[1]}", ""]
    return [re.sub(r"^ {4}(\w+: .+)", r"``\1``", line) if _OPTION.match(line) else line[4:]]


_OPTION = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


def _options_of(described: Any) -> str:
    return (inspect.getdoc(described) or "").partition("\nOptions:\n")[2]


def copy_images(app: Sphinx, error: Exception | None) -> None:
    """Pictures that a page names in HTML, as README.md does, which Sphinx does not see."""
    if error is None and app.builder.format == "html" and (DOCS / "images").exists():
        shutil.copytree(DOCS / "images", Path(app.outdir) / "docs" / "images", dirs_exist_ok=True)
        (Path(app.outdir) / "index.html").write_text(
            '<meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        )


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_generated)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", mark_options)
    app.connect("build-finished", copy_images)
