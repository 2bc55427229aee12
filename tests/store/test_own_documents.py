from pathlib import Path

import pytest

from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import seal_document
from dpo_cache.store.own_documents import is_own, note_own
from tests.promises.small_cache import make_small_cache


def test_what_this_user_publishes_is_known_at_any_place(tmp_path: Path) -> None:
    cache = open_cache(make_small_cache(tmp_path / "cache"))
    (reference,) = cache.references()
    assert is_own(cache.read_reference(reference)) and is_own(cache.pairs("dialogues").manifest)
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert is_own(open_cache(tmp_path / "moved").read_reference(reference))


def test_a_change_by_somebody_else_is_noticed(tmp_path: Path) -> None:
    cache = open_cache(make_small_cache(tmp_path / "cache"))
    (reference,) = cache.references()
    document = cache.read_reference(reference)
    document["provenance"]["model"] = "somebody/else"
    path = tmp_path / "cache/references" / reference / "reference.json"
    path.write_bytes(seal_document(document))
    assert not is_own(cache.read_reference(reference))  # though this user owns the file
    again = cache.publish_reference(document["identity"], {"model": "example/tiny"})
    assert again == reference and not is_own(cache.read_reference(reference))
    cache.publish_reference(document["identity"], {"model": "somebody/else", "revision": "main"})
    assert is_own(cache.read_reference(reference))  # this user has named the same model


def test_without_a_home_nothing_is_known_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    note_own({"a": 1})
    assert not is_own({"a": 1})
