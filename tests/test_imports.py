"""Which room may import which, and what the command line may not load to show its help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.cli.app import command_names

PACKAGE = Path(dpo_cache.__file__).parent

LEAVES = {"errors", "log", "progress", "types", "options", "losses"}
ALLOWED = {
    "cli": {
        "precomputing",
        "training",
        "sweeping",
        "planning",
        "reporting",
        "integrations",
        "exchange",
        "evaluation",
        "store",
    }
    | LEAVES,
    "integrations": {"precomputing", "training", "data", "lm", "store"} | LEAVES,
    "sweeping": {"training", "reporting", "store", "files"} | LEAVES,
    "reporting": {"lm", "store"} | LEAVES,
    "evaluation": {"data", "lm", "store", "training", "files"} | LEAVES,
    "training": {"lm", "store", "files"} | LEAVES,
    "precomputing": {"data", "lm", "store", "planning"} | LEAVES,
    "exchange": {"data", "lm", "store", "files"} | LEAVES,
    "planning": {"lm", "store", "files"} | LEAVES,
    "upkeep": {"store", "precomputing"} | LEAVES,
    "options": {"errors", "log", "losses"},
    "losses": {"errors"},
    "store": {"errors", "log", "types", "files"},
    "data": {"errors", "types", "files"},
    "lm": {"errors", "log", "types", "files"},
    "files": {"errors"},
    "progress": set(),
    "log": set(),
    "types": set(),
    "errors": set(),
}
PACKAGES_OF_ROOMS = {
    "store": {"torch", "transformers", "datasets"},
    "training": {"datasets"},
    "sweeping": {"torch", "transformers", "datasets"},
    "lm": {"datasets", "pyarrow"},
}


def modules() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__main__.py",) and path != PACKAGE / "__init__.py"
    ]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports when it runs; what stands under `if TYPE_CHECKING` is for readers
    alone.
    """
    found = set()
    tree = ast.parse(path.read_text())
    unread = [
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
    ]
    skipped = {id(node) for child in unread for node in ast.walk(child)} if room_of(path) == "cli" else set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("dpo_cache.")}
    assert rooms - {room} <= ALLOWED[room] | ({"__version__"} if room == "cli" else set())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_stay_clear_of_packages_they_have_no_use_for(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert not packages & PACKAGES_OF_ROOMS.get(room_of(path), set())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in command_names())]
)
def test_help_loads_neither_torch_nor_its_like(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["dpo-cache", *{arguments!r}]
from dpo_cache.cli.app import main
try:
    main()
except SystemExit as leaving:
    assert leaving.code == 0, leaving.code
heavy = {{"torch", "transformers", "datasets", "pyarrow", "numpy", "fsspec"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_store_is_usable_without_torch() -> None:
    code = "import sys, dpo_cache.store; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_everything_promised_at_the_top_is_there() -> None:
    for name in dpo_cache.__all__:
        assert callable(getattr(dpo_cache, name)), name
