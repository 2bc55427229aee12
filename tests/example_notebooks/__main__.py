"""`python -m tests.example_notebooks [--write] [--model FOLDER] [NOTEBOOK...]`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.documents.folder import ROOT
from tests.example_notebooks.execute import NOTEBOOKS, examples, problems, run, save


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.example_notebooks")
    parser.add_argument("notebooks", nargs="*", help="default: all in examples/")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--model", default="", help="a model's folder, instead of a tiny random one")
    chosen = parser.parse_args()
    found: list[str] = []
    with examples(chosen.model and str(Path(chosen.model).resolve())) as folder:
        for given in chosen.notebooks or NOTEBOOKS:
            name, started = str(Path(given).absolute().relative_to(ROOT)), time.monotonic()
            notebook = run(name, folder)
            if chosen.write:
                save(name, notebook)
            else:
                found += problems(name, notebook)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print("\n\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
