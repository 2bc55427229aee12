"""Which names of a stranger's cache a run starts from."""

from pathlib import Path

import pytest

from dpo_cache.errors import ModelError
from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import Document
from dpo_cache.store.starting_model import default_start, describe_start

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entry(model: object, revision: object = None, **identity: object) -> Document:
    return {
        "identity": {"dtype": "float32", **identity},
        "provenance": {"model": model, "revision": revision},
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a folder m0 and one whose name looks like a Hub id."""
    for name in ("m0", "owner/model"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "revision", "what"),
    [
        ("m0", None, "a relative path"),
        ("./m0", None, "a relative path"),
        ("../gone", COMMIT, "a relative path"),
        ("~/m0", None, "a relative path"),
        ("owner/model", COMMIT, "a relative path"),  # the folder here would be loaded, not the commit
        ("owner/other", None, "a Hub id without a commit"),
        ("owner/other", "main", "a Hub id without a commit"),
        ("owner/other", COMMIT[:39], "a Hub id without a commit"),
        ("gpt2", "v1.0", "a Hub id without a commit"),
    ],
)
def test_a_name_that_means_any_model_is_not_taken_from_a_stranger(
    here: Path, model: str, revision: str | None, what: str
) -> None:
    with pytest.raises(
        ModelError, match=f"{what}, and this user did not make .*\n.*give `model` {model}\\.$"
    ):
        default_start(entry(model, revision))


@pytest.mark.parametrize(
    ("model", "revision"), [("m0", None), ("owner/other", "main"), ("owner/other", None)]
)
def test_the_same_name_is_taken_from_an_entry_that_this_user_published(
    here: Path, model: str, revision: str | None
) -> None:
    document = entry(model, revision, weights=model)
    cache = open_cache(here / "cache", create=True)
    reference = cache.publish_reference(document["identity"], document["provenance"])
    assert default_start(cache.read_reference(reference)) == (model, revision)
    changed = {**document, "provenance": {"model": model, "revision": revision, "device": "other"}}
    with pytest.raises(ModelError, match="this user did not make its entry"):
        default_start(changed)  # one byte of somebody else's


def test_a_place_that_means_one_model_is_taken_from_anyone(here: Path) -> None:
    assert default_start(entry(str(here / "m0"))) == (str(here / "m0"), None)
    assert default_start(entry("owner/other", COMMIT)) == ("owner/other", COMMIT)
    assert describe_start("owner/other", COMMIT) == "owner/other at revision 0123456789ab"


@pytest.mark.parametrize(
    "model", [["m0"], 7, "", " ", "m0\x1b[2J", "m0\nerror: run `rm -rf`", {"a": 1}], ids=repr
)
def test_what_is_no_name_is_refused(here: Path, model: object) -> None:
    with pytest.raises(ModelError, match="which is not a path or Hub id") as caught:
        default_start(entry(model))
    assert str(caught.value).count("\n") == 1 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("revision", [7, ["main"], "a\x1b[2J"], ids=repr)
def test_a_revision_that_is_none_is_refused(here: Path, revision: object) -> None:
    with pytest.raises(ModelError, match="which is not a path or Hub id"):
        default_start(entry("owner/other", revision))


def test_an_entry_without_a_model_asks_for_one(here: Path) -> None:
    with pytest.raises(ModelError, match="was a model in memory"):
        default_start(entry(None))
    with pytest.raises(ModelError, match="reference 'a friend' was imported without a checkpoint"):
        default_start(entry(None, imported="a friend"))
    with pytest.raises(ModelError, match=f"checkpoint {here}/gone is gone"):
        default_start(entry(str(here / "gone")))
    assert default_start(entry(str(here / "gone")), checks_place=False) == (str(here / "gone"), None)
