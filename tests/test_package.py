"""The metadata of the package, and what its archives take along."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dpo_cache
from tests.installed.contents import source_problems, wheel_problems

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(dpo_cache.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["version"] == cited["version"] == dpo_cache.__version__
    assert PROJECT["project"]["license"] == cited["license"]
    assert f"\n## {dpo_cache.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_has_what_the_format_requires() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_classifiers_name_the_supported_pythons() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert named == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py310"


def test_the_wheel_takes_every_file_of_the_package_along() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--", "dpo_cache"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    others = [Path(name) for name in listed.stdout.split("\0") if name and not name.endswith(".py")]
    assert others
    assert [path for path in others if not any(path.match(pattern) for pattern in patterns)] == []


def test_what_is_missing_or_too_much_in_an_archive_is_found(tmp_path: Path) -> None:
    import tarfile
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in ("dpo_cache/a.py", "dpo_cache/old.py", "tests/b.py", "d-1.dist-info/licenses/LICENSE"):
            wheel.writestr(name, "")
    assert wheel_problems(tmp_path / "a.whl", {"dpo_cache/a.py", "dpo_cache/b.json"}) == [
        "dpo_cache/b.json is not in the wheel",
        "dpo_cache/old.py is in the wheel, and not in the repository",
        "tests: only the package and its metadata should be in a wheel",
    ]
    (tmp_path / "a.py").write_text("")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sources:
        for name in ("PKG-INFO", "dpo_cache/a.py", "notes.txt"):
            sources.add(tmp_path / "a.py", f"dpo_cache-1/{name}")
    assert source_problems(tmp_path / "a.tar.gz", {"dpo_cache/a.py", "README.md", ".ci/run"}) == [
        "README.md is not in the source distribution",
        "notes.txt is in the source distribution, and not in the repository",
    ]
