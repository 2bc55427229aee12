"""The documentation site: its navigation, and the faults that its build finds. `make docs` builds it whole."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_cache

ROOT = Path(dpo_cache.__file__).parents[1]
DOCS = ROOT / "docs"


def build(root: Path, pages: dict[str, str]) -> tuple[int, str]:
    """The exit code and the warnings of a site with these pages, under the configuration of ours."""
    (root / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", root / "docs")
    shutil.copytree(DOCS / "_static", root / "docs" / "_static")
    for name, text in pages.items():
        (root / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-c", "docs", "-q", "-W", "--keep-going", "-b", "html", ".", "site"],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_build_without_faults_passes(tmp_path: Path) -> None:
    pages = {
        "docs/index.md": "# First\n\n[why](why.md#a-reason), [security](../SECURITY.md), [code](conf.py)\n",
        "docs/why.md": "# Why\n\n## A reason\n\n[up](#why)\n",
        "SECURITY.md": "# Security\n\n[first](docs/index.md)\n",
    }
    assert build(tmp_path, pages) == (0, "")
    first = (tmp_path / "site" / "docs" / "index.html").read_text()
    assert 'href="why.html#a-reason"' in first and 'href="../SECURITY.html"' in first


def test_a_build_finds_every_kind_of_broken_link_and_a_page_that_nobody_can_reach(tmp_path: Path) -> None:
    pages = {
        "docs/index.md": "# First\n\n[a](gone.md) [b](why.md#gone) [c](#here-gone) ![d](images/gone.svg)\n",
        "docs/why.md": "# Why\n",
        "docs/lost.md": "# Lost\n",
    }
    code, warnings = build(tmp_path, pages)
    assert code == 1
    assert "target not found: 'gone.md'" in warnings
    assert "local id not found in doc 'docs/why': 'gone'" in warnings
    assert "target not found: 'here-gone'" in warnings
    assert "image file not readable: docs/images/gone.svg" in warnings
    assert "lost.md: WARNING: document isn't included in any toctree" in warnings


def test_the_navigation_names_pages_that_exist_and_the_first_page_links_them() -> None:
    conf = read_conf()
    first = (DOCS / "index.md").read_text()
    for page in [conf.file_of(entry) for part in conf.NAVIGATION.values() for entry in part]:
        assert page.exists(), page
        if page.is_relative_to(DOCS):
            assert f"]({page.relative_to(DOCS).as_posix()})" in first, page


def test_the_api_reference_has_every_public_name_once() -> None:
    groups = read_conf()._groups()
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(dpo_cache.__all__)
    assert all(name.endswith(("Report", "Compacted")) for name in groups["Reports"])


@pytest.mark.parametrize("picture", sorted((DOCS / "images").glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_has_a_text_and_colours_for_a_dark_page(picture: Path) -> None:
    text = picture.read_text()
    assert "<title" in text
    other = picture.with_name(picture.name.replace("-light", "-dark"))
    assert "prefers-color-scheme: dark" in text or (
        other.exists() and ("-light" in picture.name or "-dark" in picture.name)
    )


def read_conf():
    """docs/conf.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return conf
