"""What `export` reads and renders of a pair set that somebody else made."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_cache import data
from dpo_cache.exchange import ExportReport, export_pairs
from dpo_cache.store.format.documents import open_sealed, seal_document
from dpo_cache.store.own_documents import note_own

NOT_OWN = "and this user did not make the pair set"


@pytest.fixture
def here(source: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the cache, and what a stranger could hope to find here."""
    shutil.copytree(source / "cache", tmp_path / "cache")
    shutil.copytree(model_folder, tmp_path / "m0")
    for name in ("text.jsonl", "chat.jsonl"):
        shutil.copy(source / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(name: str, member: str, **values: Any) -> dict[str, Any]:
    """Seal the manifest with other values, as a stranger may; returns it."""
    path = Path(f"cache/pairs/{name}/train/manifest.json")
    manifest = open_sealed(path.read_bytes(), str(path))
    manifest[member] |= values
    path.write_bytes(seal_document(manifest))
    return manifest


def export(name: str, **options: Any) -> ExportReport:
    return export_pairs("cache", name, "out.jsonl", overwrite=True, log=lambda text: None, **options)


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} is called")

    monkeypatch.setattr(data, name, fail)


@pytest.mark.parametrize(
    ("member", "option", "place", "function"),
    [
        ("tokenization", "tokenizer", "m0", "load_tokenizer"),
        ("tokenization", "tokenizer", "./m0", "load_tokenizer"),
        ("tokenization", "tokenizer", "somebody/tokenizer", "load_tokenizer"),
        ("source", "dataset", "text.jsonl", "read_dataset"),
        ("source", "dataset", "somebody/pairs", "read_dataset"),
        ("source", "dataset", "https://example.org/pairs.jsonl", "read_dataset"),
    ],
)
def test_a_place_that_may_hold_anything_is_not_read_for_a_strangers_manifest(
    here: Path, monkeypatch: pytest.MonkeyPatch, member: str, option: str, place: str, function: str
) -> None:
    change("text", member, **{option: place})
    with monkeypatch.context() as patch:
        refuse(patch, function)
        report = export("text")
    assert not report.has_text and report.num_pairs == 5
    assert report.left_out[0] == (
        f"prompt, chosen and rejected as text: the manifest names {place} as the {option}, a relative path or "
        f"a Hub id, {NOT_OWN}: give `{option}` if it is the right one"
    )
    named = {"tokenizer": "m0", "dataset": "text.jsonl"}[option]
    assert export("text", **{option: named}).has_text


@pytest.mark.parametrize(("member", "option", "place"), [("tokenization", "tokenizer", "m0"), ("source", "dataset", "text.jsonl")])  # fmt: skip
def test_it_is_read_for_an_own_manifest(here: Path, member: str, option: str, place: str) -> None:
    note_own(change("text", member, **{option: place}))
    assert export("text").has_text


def test_an_absolute_path_means_one_place(here: Path) -> None:
    change("text", "source", created="2025-01-01T00:00:00+00:00")
    assert export("text").has_text


def test_a_strangers_chat_template_is_not_rendered(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    manifest = change("chat", "tokenization", chat_template=template)
    tokenizer = manifest["tokenization"]["tokenizer"]
    refuse(monkeypatch, "tokenized_windows")
    for options in ({}, {"tokenizer": "m0"}):
        place = options.get("tokenizer", tokenizer)
        assert export("chat", **options).left_out[0] == (
            f"prompt, chosen and rejected as text: the chat template of the pair set is not that of {place}, "
            f"{NOT_OWN}: a template is a program, so give a `tokenizer` that has it"
        )


def test_the_tokenizers_own_template_is_rendered_for_a_stranger(here: Path) -> None:
    change("chat", "source", created="2025-01-01T00:00:00+00:00")
    assert export("chat").has_text and export("chat", tokenizer="m0").has_text


def test_without_a_digest_of_the_tokenizer_the_pairs_decide(here: Path) -> None:
    path = Path("cache/pairs/text/train/manifest.json")
    manifest = open_sealed(path.read_bytes(), str(path))
    for member, name in (("tokenization", "tokenizer_sha256"), ("tokenization", "max_prompt_length"), ("source", "rows_read")):  # fmt: skip
        del manifest[member][name]
    path.write_bytes(seal_document(manifest))
    assert export("text").has_text
