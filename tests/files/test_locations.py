"""Paths are checked before anything is loaded."""

from pathlib import Path

import pytest

from dpo_cache.errors import ModelError, OptionError
from dpo_cache.files.locations import check_model, check_peft_config, check_revision, check_tokenizer


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{not json", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    for name in ("config.json", "adapter_config.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"no model can be loaded from it \({name} {problem}\)"):
            check_model(str(folder))
    with pytest.raises(ModelError, match=rf"no tokenizer can be loaded from it \(config.json {problem}\)"):
        check_tokenizer(str(tmp_path / "config"))
    with pytest.raises(OptionError, match=rf"no PEFT config can be read from it \(config.json {problem}\)"):
        check_peft_config(str(tmp_path / "config" / "config.json"))


def test_what_is_right_passes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    check_tokenizer(str(tmp_path))  # the model's config is not read for it
    (tmp_path / "config.json").write_text("{}")
    check_model(str(tmp_path))
    (tmp_path / "peft.json").write_text('{"peft_type": "LORA"}')
    check_peft_config(str(tmp_path / "peft.json"))
    for name in ("owner/name", "gpt2"):
        check_model(name)
        check_tokenizer(name)
        check_revision(name, "main")
    check_revision(str(tmp_path), None)


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^`revision` main: {tmp_path} is a local folder"):
        check_revision(str(tmp_path), "main")
