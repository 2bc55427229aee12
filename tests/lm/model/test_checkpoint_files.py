"""The files that are hashed are those that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.unchanged import one_checkpoint
from tests.conftest import make_completions, make_llama, naive_token_logps


def identify(folder: Path) -> dict:
    return reference_identity(str(folder), load_config(str(folder)), torch.float32)


def logps(folder: Path) -> torch.Tensor:
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    return naive_token_logps(model, make_completions()[0])


def name_weights(folder: Path, name: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": name}))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder whose config names another file than the usual one."""
    make_llama().save_pretrained(tmp_path / "two")
    make_llama(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "two" / "other.safetensors")
    name_weights(tmp_path / "two", "other.safetensors")
    return tmp_path / "two"


def test_the_file_that_the_config_names_is_hashed(two: Path, tmp_path: Path) -> None:
    make_llama(seed=1).save_pretrained(tmp_path / "plain")
    assert identify(two) == identify(tmp_path / "plain")
    assert torch.equal(logps(two), logps(tmp_path / "plain"))
    tensors = load_file(two / "other.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, two / "other.safetensors")
    assert identify(two) != identify(tmp_path / "plain")


def test_an_index_that_the_config_names_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").rename(folder / "mine.safetensors.index.json")
    name_weights(folder, "mine.safetensors.index.json")
    make_llama().save_pretrained(tmp_path / "plain")
    assert identify(folder) == identify(tmp_path / "plain")
    assert torch.equal(logps(folder), logps(tmp_path / "plain"))


@pytest.mark.parametrize(
    "name",
    ["../two/model.safetensors", "/etc/model.safetensors", "model.bin", "pytorch_model.bin.index.json", 7],
)
def test_a_name_that_is_no_safetensors_file_of_the_folder_is_refused(two: Path, name: object) -> None:
    name_weights(two, name)
    with pytest.raises(ModelError, match=r"transformers_weights is .*; expected a safetensors file"):
        identify(two)


def test_a_named_file_that_is_missing_is_named(two: Path) -> None:
    (two / "other.safetensors").unlink()
    with pytest.raises(ModelError, match=r"other.safetensors is missing"):
        identify(two)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        checkpoint_files(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": null}', '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "null"],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"not an index of safetensors files|no safetensors weights"):
        checkpoint_files(str(tmp_path))


def test_a_named_index_that_is_written_again_between_hashing_and_loading_is_noticed(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        make_llama(seed=seed).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    names = load_file(tmp_path / "one.safetensors")
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}))
    name_weights(tmp_path, index.name)
    with one_checkpoint():
        identify(tmp_path)
        index.write_text(index.read_text().replace("one.", "other."))
        with pytest.raises(
            ModelError, match=r"x.safetensors.index.json was changed while the model was read"
        ):
            logps(tmp_path)
