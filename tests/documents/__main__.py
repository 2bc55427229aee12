"""`python -m tests.documents [--write] [--model FOLDER] [PAGE...]`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tests.conftest  # noqa: F401  (first: it sets variables that libraries read when they are imported)
from tests.documents.folder import ROOT
from tests.documents.pages import PAGES, Page, workplace


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.documents")
    parser.add_argument("pages", nargs="*", help="default: README.md and all of docs/")
    parser.add_argument("--write", action="store_true", help="write the real output into the pages")
    parser.add_argument("--model", default="", help="a model, instead of a tiny random one")
    chosen = parser.parse_args()
    num_problems = 0
    with workplace(chosen.model and str(Path(chosen.model).resolve())) as place:
        for name in chosen.pages or PAGES:
            page = Page(str(Path(name).absolute().relative_to(ROOT)))
            page.run(place)
            if chosen.write and (page.problems or chosen.model):
                page.write(everything=bool(chosen.model))
            for problem in page.problems:
                print(f"{problem}\n")
            num_problems += len(page.problems)
    sys.exit(1 if num_problems and not chosen.write else 0)


if __name__ == "__main__":
    main()
