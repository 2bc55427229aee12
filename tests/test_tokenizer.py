"""Loading a tokenizer, and its digest."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_cache.errors import DataError, ModelError
from dpo_cache.tokenizer import load_tokenizer, tokenizer_digest
from tests.data.conftest import make_byte_tokenizer, tokenizers  # noqa: F401  a fixture
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
