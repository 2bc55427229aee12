"""Promise 12: whatever a sealed document holds, a command succeeds or says what is wrong with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.store.format.documents import Document
from dpo_cache.training.gradient_check import GradientCheck
from tests.conftest import chat_rows, write_rows
from tests.promises.odd_members import (
    commands,
    mutations,
    raw_errors,
    read,
    with_manifest,
    with_reference,
)
from tests.rotation import today

SAMPLED = 61  # one in so many of the mutations, others each day, is tried by `make test`
WITH_MODEL = ("train", "train, default start", "eval", "precompute")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    write_rows(folder / "pairs.jsonl", chat_rows(2))
    dpo_cache.precompute(model_folder, folder / "pairs.jsonl", folder / "base", log=lambda text: None)
    return folder


Put = Callable[[Path, Path, Document], None]


def documents(base: Path) -> list[tuple[str, Put, Document]]:
    (manifest,) = base.glob("base/pairs/*/*/manifest.json")
    (reference,) = base.glob("base/references/*/reference.json")
    return [
        *((f"manifest {name}", with_manifest, changed) for name, changed in mutations(read(manifest))),
        *((f"reference {name}", with_reference, changed) for name, changed in mutations(read(reference))),
    ]


@pytest.fixture(autouse=True)
def no_gradient_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")


@pytest.mark.parametrize("every", [SAMPLED, pytest.param(1, marks=pytest.mark.slow)])
def test_commands_that_load_no_model(base: Path, model_folder: str, tmp_path: Path, every: int) -> None:
    check(
        base,
        model_folder,
        tmp_path,
        documents(base)[today() % every :: every],
        lambda name: name not in WITH_MODEL,
    )


def test_a_manifest_without_a_whole_member(base: Path, model_folder: str, tmp_path: Path) -> None:
    whole = {"manifest source", "manifest tokenization", "manifest pairs_digest"}
    cases = [case for case in documents(base) if case[0].removesuffix(" = missing") in whole]
    check(base, model_folder, tmp_path, cases, lambda name: True)


@pytest.mark.parametrize("every", [293, pytest.param(1, marks=pytest.mark.slow)])
def test_commands_that_load_a_model(base: Path, model_folder: str, tmp_path: Path, every: int) -> None:
    check(base, model_folder, tmp_path, documents(base)[::every], lambda name: name in WITH_MODEL)


def check(
    base: Path,
    model: str,
    scratch: Path,
    cases: list[tuple[str, Put, Document]],
    chosen: Callable[[str], bool],
) -> None:
    cache, raw = scratch / "cache", []
    every = commands(str(cache), str(base / "base"), model, str(base / "pairs.jsonl"), scratch)
    tried = {name: run for name, run in every.items() if chosen(name)}
    assert len(cases) > 2 and len(tried) > 3
    for label, put, document in cases:
        put(base / "base", cache, document)
        raw += [f"{label}: {error}" for error in raw_errors(tried)]
    assert raw == []
