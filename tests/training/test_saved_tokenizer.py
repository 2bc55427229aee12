"""The tokenizer and the chat template that are saved with a trained model."""

from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import ModelError
from dpo_cache.options.train import TrainOptions
from dpo_cache.store.own_documents import note_own
from dpo_cache.tokenizer import load_tokenizer, tokenizer_digest
from dpo_cache.training.saved_tokenizer import choose_tokenizer
from tests.conftest import make_tokenizer

OWN, OTHER = "{{ messages }}own", "{{ messages }}other"


def save(folder: Path, template: str | dict[str, str] | None = OWN, **more: Any) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    if more:
        tokenizer.add_special_tokens(more)
    tokenizer.save_pretrained(folder)
    return str(folder)


def made_with(
    location: str | None, template: str | dict[str, str] | None, digest: str | None = None
) -> dict[str, Any]:
    tokenization = {"tokenizer": location, "chat_template": template, "tokenizer_sha256": digest}
    return {"name": location, "tokenization": tokenization}


def choose(manifest: dict[str, Any], model: str, **options: Any) -> tuple[Any, list[str]]:
    remarks: list[str] = []
    chosen = TrainOptions(cache="c", output="o", model=model, **options)
    saved = choose_tokenizer(chosen, manifest, [(model, None)], None, remarks.append, trusted=False)
    return saved, remarks


def test_the_template_of_the_pairs_is_saved_and_a_difference_is_logged(tmp_path: Path) -> None:
    model = save(tmp_path / "m")
    saved, remarks = choose(made_with(model, OTHER), model)
    assert saved.tokenizer.chat_template == OTHER and saved.has_other_template
    (remark,) = remarks
    assert f"{model} has another chat template than the one that the pairs were made with" in remark
    assert "`chat_template` model saves the model's own" in remark
    saved, remarks = choose(made_with(model, OWN), model)
    assert (saved.tokenizer.chat_template, saved.has_other_template, remarks) == (OWN, False, [])


def test_the_option_decides(tmp_path: Path) -> None:
    model, file = save(tmp_path / "m"), tmp_path / "mine.jinja"
    file.write_text("mine")
    for choice, expected in (("model", OWN), ("pairs", OTHER), (str(file), "mine")):
        saved, _ = choose(made_with(model, OTHER), model, chat_template=choice)
        assert saved.tokenizer.chat_template == expected
    saved, remarks = choose(made_with(None, None), model)  # imported ids have no template
    assert (saved.tokenizer.chat_template, saved.has_other_template, remarks) == (OWN, False, [])


def test_a_model_without_a_template_is_logged(tmp_path: Path) -> None:
    model = save(tmp_path / "m", None)
    saved, (remark,) = choose(made_with(model, OTHER), model)
    assert saved.tokenizer.chat_template == OTHER and "has no chat template" in remark


def test_the_tokenizer_of_the_pairs_is_saved_where_it_is_another(tmp_path: Path) -> None:
    model = save(tmp_path / "m")
    other = save(tmp_path / "other", additional_special_tokens=["<|more|>"])
    saved, _ = choose(made_with(other, OWN), model)
    assert "<|more|>" in saved.tokenizer.get_vocab()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OWN
    gone = str(tmp_path / "gone")  # the model's own is the same by its digest: nothing is read from there
    saved, remarks = choose(made_with(gone, OWN, tokenizer_digest(tokenizer)), model)
    assert "<|more|>" not in saved.tokenizer.get_vocab() and remarks == []
    saved, (remark,) = choose(made_with(gone, OWN, "0" * 64), model)
    assert f"{gone}, is not read: its files are gone" in remark


def test_a_place_that_may_hold_anything_is_read_only_for_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "m")
    save(tmp_path / "here", additional_special_tokens=["<|more|>"])
    monkeypatch.chdir(tmp_path)
    manifest = made_with("here", OWN, "0" * 64)
    saved, (remark,) = choose(manifest, model)
    assert "this user did not make the pair set" in remark
    assert "<|more|>" not in saved.tokenizer.get_vocab()
    note_own(manifest)
    saved, remarks = choose(manifest, model)
    assert "<|more|>" in saved.tokenizer.get_vocab() and remarks == []


def test_no_tokenizer_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ModelError, match="no tokenizer in .*gone or .*empty; the trained model would be saved w"
    ):
        choose(made_with(str(tmp_path / "gone"), None), str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "templates",
    [{"default": OWN, "tool_use": OTHER}, {"rag": OWN, "tool_use": OTHER}],
    ids=["with a default", "without"],
)
def test_named_templates_are_saved_by_their_names(tmp_path: Path, templates: dict[str, str]) -> None:
    model = save(tmp_path / "m", templates)
    saved, remarks = choose(made_with(model, templates), model)
    assert (saved.tokenizer.chat_template, saved.has_other_template, remarks) == (templates, False, [])
    saved.tokenizer.save_pretrained(tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).chat_template == templates
    saved, _ = choose(made_with(model, templates), model, chat_template="tool_use")
    assert saved.tokenizer.chat_template == OTHER
