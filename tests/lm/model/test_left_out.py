"""What a checkpoint has besides the language model that is loaded of it."""

import json
from pathlib import Path

import pytest
import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.model import left_out
from dpo_cache.lm.model.adapter import CheckpointLocation
from dpo_cache.lm.model.left_out import find_left_out
from dpo_cache.lm.model.load import load_base
from tests.conftest import make_llama
from tests.families.tiny import make_tiny
from tests.training.test_towers import tensors


def load(folder: Path) -> torch.nn.Module:
    return load_base(CheckpointLocation(str(folder), None), dtype=torch.float32, device=torch.device("cpu"))


def test_a_causal_lm_leaves_nothing_out(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    assert find_left_out(load(tmp_path), str(tmp_path)) is None


def test_a_model_in_memory_has_its_towers_itself(tmp_path: Path) -> None:
    model = make_tiny("mistral3")
    assert find_left_out(model, "nowhere/at-all") is None  # it was never saved
    model.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    found = find_left_out(model, str(tmp_path))
    assert found is not None and not found.tensors and found.files == {"processor_config.json": b"{}"}


def test_towers_are_saved_in_shards_although_their_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "SHARD_BYTES", 20_000)
    folder, target = tmp_path / "model", tmp_path / "saved"
    make_tiny("mistral3").to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    before = tensors(folder)
    model = load(folder)
    found = find_left_out(model, str(folder))
    assert found is not None
    assert found.num_bytes == sum(before[name].nbytes for name in found.tensors)
    assert found.tensors.keys() == {name for name in before if "vision_tower" in name}
    for path in folder.iterdir():
        path.unlink()
    model.save_pretrained(target, max_shard_size="30KB")
    found.add_to(target)
    after = tensors(target)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    assert all(after[name].dtype == before[name].dtype for name in found.tensors)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert len({index["weight_map"][name] for name in found.tensors}) > 1


def test_a_model_without_its_towers_needs_its_checkpoint(tmp_path: Path) -> None:
    make_tiny("mistral3").save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        find_left_out(model, "nowhere/at-all")
