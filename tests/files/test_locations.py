"""Paths are checked before anything is loaded."""

from pathlib import Path

import pytest

from dpo_cache.errors import ModelError, OptionError, StorageError
from dpo_cache.files.locations import (
    check_model,
    check_output,
    check_peft_config,
    check_revision,
    check_tokenizer,
    is_absolute,
    is_path,
    is_url,
)
from tests.store.other_user import as_other_user, needs_root


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


def test_a_folder_without_a_tokenizer_and_a_file_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for location, problem in (
        (tmp_path, "no files of a tokenizer in it"),
        (tmp_path / "notes", "not a folder"),
    ):
        with pytest.raises(ModelError, match=f"no tokenizer can be loaded from it .{problem}"):
            check_tokenizer(str(location))


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


@pytest.mark.parametrize("output", ["s3://bucket/out.jsonl", "file:///tmp/out.jsonl", "hf://datasets/a/b"])
def test_an_output_is_no_url(output: str) -> None:
    with pytest.raises(OptionError, match="^`output` .*: expected a path, found a URL"):
        check_output(output, "jsonl", overwrite=False)


def test_an_output_may_be_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    check_output(str(tmp_path / "new" / "out.jsonl"), "jsonl", overwrite=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("parent", ["file", "/proc/none"])
def test_an_output_that_cannot_be_written_is_found_before_it_is_computed(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="^cannot write .*out.jsonl: .*\n.*choose another `output`"):
        check_output(str(tmp_path / parent / "out.jsonl"), "jsonl", overwrite=False)


@needs_root
def test_an_output_in_another_users_folder_is_refused() -> None:
    found = as_other_user(lambda: check_output("/root/out.jsonl", "jsonl", overwrite=False))
    assert "cannot write /root/out.jsonl: Permission denied" in found


# -- paths of Windows, on any system ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "absolute", "url"),
    [
        (r"C:\models\llama", True, True, False),
        ("C:/models", True, True, False),
        ("C://models", True, True, False),
        ("c:models", True, False, False),
        (r"models\llama", True, False, False),
        (r"\\server\share\models", True, True, False),
        ("//server/share/models", True, True, False),
        ("/models", True, True, False),
        ("./models", True, False, False),
        ("~/models", True, False, False),
        ("owner/name", False, False, False),
        ("gpt2", False, False, False),
        ("s3://bucket/cache", True, False, True),
        ("file:///C:/cache", True, False, True),
    ],
)
def test_drives_backslashes_and_schemes_are_told_apart(
    text: str, path: bool, absolute: bool, url: bool
) -> None:
    assert (is_path(text), is_absolute(text), is_url(text)) == (path, absolute, url)


@pytest.mark.parametrize("location", [r"C:\none", "D:/none/model", r"none\model"])
def test_a_path_of_windows_is_no_id_of_the_hub(location: str) -> None:
    with pytest.raises(ModelError, match="no model can be loaded from it .no such folder"):
        check_model(location)
    with pytest.raises(ModelError, match="no tokenizer can be loaded from it .no such folder"):
        check_tokenizer(location)


def test_an_output_on_a_drive_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output("C://out.jsonl", "jsonl", overwrite=False)
