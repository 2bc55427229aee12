"""Checks what a wheel and a source distribution hold: `python tests/installed/contents.py dist`.

The wheel is built from the source distribution, so what it holds is compared with the package's folder here:
every file must be in it, and nothing else. Needs no package but Python's own.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
IN_SOURCES = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "SECURITY.md", "pyproject.toml", "docs", "examples", "tests", "benchmarks", "dpo_cache",
)  # fmt: skip
NOT_IN_SOURCES = {".ci", ".gitignore"}  # of the repository


def wheel_problems(wheel: Path, package: set[str]) -> list[str]:
    """What is wrong with a wheel, whose package should have these files."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if name.startswith("dpo_cache/")}
    others = {name.split("/")[0] for name in names - inside}
    problems = [f"{name} is not in the wheel" for name in sorted(package - inside)]
    problems += [f"{name} is in the wheel, and not in the repository" for name in sorted(inside - package)]
    problems += [f"{name}: only the package and its metadata should be in a wheel"
                 for name in sorted(others) if not name.endswith(".dist-info")]  # fmt: skip
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        problems.append("the license is not in the wheel")
    return problems


def source_problems(sources: Path, tracked: set[str]) -> list[str]:
    """What is wrong with a source distribution of a repository with these files."""
    with tarfile.open(sources) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = {name for name in tracked if name.split("/")[0] not in NOT_IN_SOURCES}
    made = {"PKG-INFO", "setup.cfg"}
    found = {name for name in names if not name.startswith("dpo_cache.egg-info/")}
    problems = [f"{name} is not in the source distribution" for name in sorted(wanted - found)]
    extra = sorted(found - tracked - made)
    return problems + [f"{name} is in the source distribution, and not in the repository" for name in extra]


def tracked_files(*paths: str) -> set[str]:
    """The repository's files below these paths."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *paths,
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def main(folder: str) -> int:
    """Print what is wrong with the archives in the folder; returns the number of problems, 1 at most."""
    wheels, sources = sorted(Path(folder).glob("*.whl")), sorted(Path(folder).glob("*.tar.gz"))
    problems = [] if (len(wheels), len(sources)) == (1, 1) else [f"{folder}: expected a wheel and a .tar.gz"]
    if not problems:
        problems = wheel_problems(wheels[0], tracked_files("dpo_cache"))
        problems += source_problems(sources[0], tracked_files(*IN_SOURCES))
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{wheels[0].name} and {sources[0].name} hold what they should.")
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
