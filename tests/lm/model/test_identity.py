import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import choose_device, choose_dtype
from dpo_cache.lm.model import identity as identity_module
from dpo_cache.lm.model.identity import checkpoint_files, computing_fields, reference_identity, weights_digest
from dpo_cache.lm.model.load import check_causal, load_config
from tests.conftest import make_llama


def digest(folder: Path) -> str:
    return weights_digest(checkpoint_files(str(folder)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def test_sharding_and_metadata_do_not_change_the_digest(saved: Path, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tensors = load_file(saved / "model.safetensors")
    (tmp_path / "reordered").mkdir()
    save_file(
        dict(reversed(tensors.items())),
        tmp_path / "reordered" / "model.safetensors",
        metadata={"made": "elsewhere"},
    )
    assert digest(saved) == digest(tmp_path / "sharded") == digest(tmp_path / "reordered")


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_any_change_of_a_tensor_changes_the_digest(saved: Path, tmp_path: Path, change: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    name, tensor = "model.norm.weight", tensors.pop("model.norm.weight")
    changed = {
        "value": {name: torch.nextafter(tensor, tensor + 1)},
        "name": {"model.norm.scale": tensor},
        "dtype": {name: tensor.view(torch.int32)},
        "shape": {name: tensor.reshape(2, -1)},
    }[change]
    (tmp_path / "changed").mkdir()
    save_file({**tensors, **changed}, tmp_path / "changed" / "model.safetensors")
    assert digest(saved) != digest(tmp_path / "changed")


def test_a_file_is_hashed_again_only_when_it_changed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = identity_module._hash_tensors
    monkeypatch.setattr(identity_module, "_hash_tensors", lambda path: (hashed.append(path), real(path))[1])
    first = digest(saved)
    assert digest(saved) == first and len(hashed) == 1
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert digest(saved) != first and len(hashed) == 2


def test_a_home_that_cannot_be_written_costs_time_only(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digest(saved)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert digest(saved) == expected


def test_only_what_changes_the_computation_is_in_the_identity(saved: Path) -> None:
    config = load_config(str(saved))
    base = reference_identity(str(saved), config, torch.float32)
    config.use_cache, config.bos_token_id, config.attention_dropout = False, 7, 0.5
    assert reference_identity(str(saved), config, torch.float32) == base
    assert reference_identity(str(saved), config, torch.bfloat16) != base
    config.rms_norm_eps = 1e-3
    assert reference_identity(str(saved), config, torch.float32) != base


def test_a_default_that_is_spelled_out_changes_nothing() -> None:
    assert (
        computing_fields(LlamaConfig(rms_norm_eps=1e-6))
        == computing_fields(LlamaConfig())
        == {"model_type": "llama"}
    )


def test_quantization_is_part_of_the_identity(saved: Path) -> None:
    config = load_config(str(saved))
    base = reference_identity(str(saved), config, torch.float32)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert reference_identity(str(saved), config, torch.float32) == {
        **base,
        "quantization": config.quantization_config,
    }


@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("<Q", 10**9) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        digest(tmp_path)


def test_a_checkpoint_that_was_cut_short_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        digest(saved)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        digest(tmp_path)


def test_architectures_without_a_causal_head_are_refused() -> None:
    with pytest.raises(ModelError, match="T5ForConditionalGeneration, which has no causal LM head"):
        check_causal(LlamaConfig(architectures=["T5ForConditionalGeneration"]), "here")
    check_causal(LlamaConfig(architectures=["GPT2LMHeadModel"]), "here")


def test_auto_is_float32_on_a_cpu_whatever_the_checkpoint_says() -> None:
    cpu = choose_device("cpu")
    assert choose_dtype("auto", cpu, torch.bfloat16) == torch.float32
    assert choose_dtype("bfloat16", cpu, torch.float32) == torch.bfloat16
    assert choose_dtype("auto", torch.device("mps"), torch.float16) == torch.float16
