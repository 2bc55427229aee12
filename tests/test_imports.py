"""Which room may import which, and what the command line may not load to show its help."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.cli.app import COMMANDS

PACKAGE = Path(dpo_cache.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"

# Every edge between rooms, for `if TYPE_CHECKING` too. A room is a folder or a file at the top of the package.
# Imports run down this table and never up; CONTRIBUTING.md shows the same one.
ALLOWED = {
    "cli": "data errors evaluation exchange log losses options planning precomputing progress reporting store suggestions sweeping training upkeep",
    "integrations": "errors lm log precomputing store training types",
    "upkeep": "log options precomputing progress store",
    "sweeping": "errors files log notebook options planning progress reporting training",
    "reporting": "errors losses options packages",
    "evaluation": "errors files lm log losses notebook options progress store tokenizer training types",
    "exchange": "data errors files lm log notebook options progress store types",
    "training": "errors files lm log losses notebook options packages planning progress store suggestions tokenizer types",
    "precomputing": "data errors files lm log notebook options packages planning progress store types",
    "planning": "data errors files lm log notebook options packages progress store types",
    "options": "errors log losses suggestions",
    "data": "errors files tokenizer types",
    "lm": "errors files log packages types",
    "store": "errors files log notebook suggestions types",
    "losses": "errors",
    "files": "errors",
    "tokenizer": "errors",
    "progress": "errors log notebook terminal",
    "terminal": "errors",
    "notebook": "errors",
    "log": "errors",
    "types": "",
    "suggestions": "errors",
    "packages": "errors",
    "errors": "",
}
EDGES = {room: set(below.split()) for room, below in ALLOWED.items()}

# Rooms, or single files, and the packages that they never import.
WITHOUT = {
    "store": {"torch", "transformers", "datasets"},
    "options": {"torch", "transformers", "datasets", "pyarrow", "numpy"},
    "losses/table.py": {"torch", "transformers", "numpy"},
    "sweeping": {"torch", "transformers", "datasets"},
    "training": {"datasets"},
    "lm": {"datasets", "pyarrow"},
    "types.py": {"torch"},
}
# The only places that may import these.
ONLY_IN = {
    "trl": {"integrations"},
    "ray": {"precomputing/workers"},
    "accelerate.commands": {"training/distributed.py"},
    "accelerate.launchers": {"training/distributed.py"},
}
STRANGERS = ("data", "lm", "store", "losses")  # do not know each other


def modules() -> list[Path]:
    """Every file of every room; `__init__` and `__main__` of the package are above the rooms."""
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
    ]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imported_modules(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imported_rooms(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("dpo_cache.")}
    return names - {room_of(path), "__version__"}


def is_within(path: Path, place: str) -> bool:
    return path == PACKAGE / place or PACKAGE / place in path.parents


def test_a_room_imports_only_rooms_that_the_table_allows() -> None:
    found = {str(path): imported_rooms(path) - EDGES[room_of(path)] for path in modules()}
    assert {path: rooms for path, rooms in found.items() if rooms} == {}


def test_every_allowed_edge_is_in_use() -> None:
    used: dict[str, set[str]] = {room: set() for room in EDGES}
    for path in modules():
        used[room_of(path)] |= imported_rooms(path)
    assert {room: sorted(EDGES[room] - used[room]) for room in EDGES if EDGES[room] - used[room]} == {}


def test_imports_run_down_the_table() -> None:
    order = list(EDGES)
    up = [(room, other) for room in order for other in EDGES[room] if order.index(other) <= order.index(room)]
    assert up == []  # so that no rooms can import each other in a circle


def test_the_rooms_at_the_bottom_do_not_know_each_other() -> None:
    assert {room: EDGES[room] & set(STRANGERS) for room in STRANGERS} == {room: set() for room in STRANGERS}
    for room in ("training", "evaluation"):
        assert not EDGES[room] & {"precomputing", "data"}


def test_contributing_shows_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", CONTRIBUTING.read_text(), re.MULTILINE)
    assert [(room, " ".join(below.split())) for room, below in rows] == list(ALLOWED.items())


@pytest.mark.parametrize("place", WITHOUT)
def test_rooms_stay_clear_of_packages_they_have_no_use_for(place: str) -> None:
    within = [path for path in modules() if is_within(path, place)]
    found = {
        str(path): {name.split(".")[0] for name in imported_modules(path)} & WITHOUT[place] for path in within
    }
    assert within and {path: packages for path, packages in found.items() if packages} == {}


@pytest.mark.parametrize("package", ONLY_IN)
def test_some_packages_are_imported_only_in_their_places(package: str) -> None:
    found = [
        str(path)
        for path in modules()
        if any(f"{name}.".startswith(f"{package}.") for name in imported_modules(path))
        and not any(is_within(path, place) for place in ONLY_IN[package])
    ]
    assert found == []


HELP = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
# One process has imported the command line, and forks one more for each command.
SHOW_HELP = f"""
import os, sys
from dpo_cache.cli.app import main
for arguments in {HELP!r}:
    child = os.fork()
    if not child:
        sys.argv, code = ["dpo-cache", *arguments], None
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        sys.stdout.flush()
        heavy = {{"torch", "transformers", "datasets", "pyarrow", "numpy", "fsspec"}} & set(sys.modules)
        if code or heavy:
            print(arguments, code, heavy, file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_help_loads_neither_torch_nor_its_like() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW_HELP], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: dpo-cache") == len(HELP) - 1


def test_the_store_is_usable_without_torch() -> None:
    code = "import sys, dpo_cache.store; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_everything_promised_at_the_top_is_there() -> None:
    for name in dpo_cache.__all__:
        assert callable(getattr(dpo_cache, name)), name
