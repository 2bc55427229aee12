"""Optional packages: found without importing them, and named where they are missing."""

import importlib.util
from importlib import metadata

import pytest

from dpo_cache import packages
from dpo_cache.errors import ModelError, OptionError


def hide(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest)
    )


def test_the_error_has_the_kind_that_is_asked_for_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    packages.check_bitsandbytes("`quantize` 4bit") if packages.is_installed("bitsandbytes") else None
    hide(monkeypatch, "bitsandbytes")
    with pytest.raises(ModelError) as caught:
        packages.check_bitsandbytes("`quantize` 4bit", ModelError)
    assert str(caught.value) == (
        "`quantize` 4bit needs bitsandbytes, which is not installed.\nRun `pip install 'dpo-cache[quantize]'`."
    )


def test_matplotlib_and_ray_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "matplotlib", "ray")
    with pytest.raises(
        OptionError, match=r"`plot` needs matplotlib.\nInstall it with `pip install 'dpo-cache\[plot\]'"
    ):
        packages.check_matplotlib()
    with pytest.raises(
        OptionError, match=r"`ray` needs Ray, which is not installed.\n.*dpo-cache\[ray\].*>=2.55,<2.64"
    ):
        packages.check_ray()


@pytest.mark.parametrize(
    ("version", "is_right"), [("2.54.9", False), ("2.55.0", True), ("2.63.1", True), ("2.64.0", False)]
)
def test_versions_of_ray(monkeypatch: pytest.MonkeyPatch, version: str, is_right: bool) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: True)
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if is_right:
        packages.check_ray()
    else:
        with pytest.raises(OptionError, match=f"Ray {version} is not supported"):
            packages.check_ray()


def test_a_ray_without_metadata_shows_its_version_when_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "is_installed", lambda module: True)
    monkeypatch.setattr(metadata, "version", unknown)
    packages.check_ray()
