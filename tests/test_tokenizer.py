"""Loading a tokenizer, and its digest."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_cache.errors import DataError, ModelError
from dpo_cache.tokenizer import load_tokenizer, set_chat_template, tokenizer_digest
from tests.data.checkpoints import FAMILIES, save_checkpoint
from tests.data.conftest import make_byte_tokenizer, tokenizers  # noqa: F401  a fixture
from tests.data.kinds import KINDS as MORE_KINDS
from tests.data.kinds import python_tokenizer
from tests.data.test_tokenize import KINDS, MERGED_TEMPLATE, TEXT_ROWS, tokenize


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_outlives_saving_and_loading(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, kind: str
) -> None:
    tokenizers[kind].save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    digest = tokenizer_digest(loaded)
    assert digest == tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizers[kind])
    tokenize(TEXT_ROWS, loaded)
    assert tokenizer_digest(loaded) == digest


def test_the_digest_changes_with_everything_that_decides_the_ids() -> None:
    variants = {name: make_byte_tokenizer() for name in ("same", "again", "template", "eos", "token")}
    variants["merge"] = make_byte_tokenizer([("a", "b")])
    variants["template"].chat_template = MERGED_TEMPLATE
    variants["eos"].eos_token = "<|pad|>"
    variants["token"].add_tokens(["<|tool|>"])
    digests = {name: tokenizer_digest(tokenizer) for name, tokenizer in variants.items()}
    assert digests.pop("again") == digests["same"]
    assert len(set(digests.values())) == 5


def test_the_digest_does_not_follow_padding_and_truncation() -> None:
    tokenizer = make_byte_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert tokenizer_digest(tokenizer) == digest


def test_a_given_chat_template_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    make_byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "other.jinja").write_text(MERGED_TEMPLATE + "é", encoding="utf-8")
    assert load_tokenizer(str(tmp_path)).chat_template == make_byte_tokenizer().chat_template
    assert (
        load_tokenizer(str(tmp_path), chat_template=str(tmp_path / "other.jinja")).chat_template
        == MERGED_TEMPLATE + "é"
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not UTF-8"])
def test_a_chat_template_that_cannot_be_read_is_reported(tmp_path: Path, content: bytes | None) -> None:
    make_byte_tokenizer().save_pretrained(tmp_path)
    template = tmp_path / "other.jinja"
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path), chat_template=str(template))
    assert str(caught.value).startswith(f"`chat_template` {template}: not readable (")


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["nothing", "broken", "empty"])
def test_a_folder_without_a_tokenizer_says_how_to_give_one(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: no tokenizer can be loaded from it (")
    assert str(caught.value).endswith(").\nGive a folder with a tokenizer, or a Hub id, as `tokenizer`.")


# -- templates in files of their own ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_in_their_own_files_outlive_saving_and_loading(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_checkpoint(family, tmp_path / "model"))
    assert tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert saved.chat_template == tokenizer.chat_template
    assert tokenizer_digest(saved) == tokenizer_digest(tokenizer)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_the_digest_of_every_kind_outlives_saving_and_loading(kind: str, tmp_path: Path) -> None:
    tokenizer = MORE_KINDS[kind]()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizer)


def test_named_templates_are_a_dictionary_in_any_form(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "rag": "b", "tool_use": "c"}
    tokenizer.save_pretrained(tmp_path / "files")
    tokenizer.save_pretrained(
        tmp_path / "config", save_jinja_files=False
    )  # as a list, in tokenizer_config.json
    assert not list((tmp_path / "config").rglob("*.jinja"))
    for form in ("files", "config"):
        loaded = load_tokenizer(str(tmp_path / form))
        assert loaded.chat_template == tokenizer.chat_template
        assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)


def test_the_digest_follows_named_templates_but_not_their_order() -> None:
    tokenizer, digests = make_byte_tokenizer(), []
    for template in (
        {"default": "a", "rag": "b"},
        {"rag": "b", "default": "a"},
        {"default": "a", "rag": "c"},
    ):
        tokenizer.chat_template = template
        digests.append(tokenizer_digest(tokenizer))
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_follows_the_rules_of_a_python_tokenizer() -> None:
    class Lowercase(type(python_tokenizer())):  # type: ignore[misc]
        def _tokenize(self, text: str) -> list[str]:
            return super()._tokenize(text.lower())

    plain, added, lower = python_tokenizer(), python_tokenizer(), Lowercase(extra_ids=0)
    added.add_tokens(["<|more|>"])
    lower.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    lower.chat_template = plain.chat_template
    Lowercase.__name__ = type(plain).__name__  # only the rule differs
    assert len({tokenizer_digest(each) for each in (plain, python_tokenizer(), added, lower)}) == 3


def test_a_template_of_the_tokenizer_is_chosen_by_its_name(tmp_path: Path) -> None:
    folder = save_checkpoint("command-r", tmp_path / "model")
    templates = load_tokenizer(folder).chat_template
    assert set(templates) == {"default", "rag", "tool_use"}
    assert load_tokenizer(folder, chat_template="rag").chat_template == templates["rag"]


def test_a_name_that_no_template_has_is_reported_with_those_there_are(tmp_path: Path) -> None:
    folder = save_checkpoint("command-r", tmp_path / "model")
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder, chat_template="tools")
    assert str(caught.value) == (
        "`chat_template` tools: not readable (no such file or directory).\n"
        "The tokenizer's own templates are default, rag, tool_use."
    )


def test_a_file_is_read_where_a_template_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rag").write_text("of the file")
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "rag": "b"}
    set_chat_template(tokenizer, "rag")
    assert tokenizer.chat_template == "of the file"


def test_the_template_of_a_processor_is_read_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    for name, own, expected in (("none", None, "processor's"), ("own", "own", "own")):
        tokenizer.chat_template = own
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.json").write_text('{"chat_template": "processor\'s"}')
        assert load_tokenizer(str(tmp_path / name)).chat_template == expected
    (tmp_path / "none" / "chat_template.json").write_text("[]")
    with pytest.raises(ModelError, match=r"chat_template.json: no chat template can be read from it \("):
        load_tokenizer(str(tmp_path / "none"))
