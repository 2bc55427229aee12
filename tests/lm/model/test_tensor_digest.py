"""One digest for one model, in whichever files and dtype it is stored; another for any other tensor."""

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cache.errors import ModelError
from dpo_cache.lm.model import tensor_digest
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.tensor_digest import TensorNames, weights_digest
from tests.conftest import make_llama

FILE = "model.safetensors"


def digest(folder: Path, **names: object) -> str:
    return weights_digest(checkpoint_files(str(folder)), TensorNames(**names))


def save(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE, metadata=metadata or None)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def test_sharding_names_of_files_and_metadata_do_not_count(saved: Path, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tensors = load_file(saved / FILE)
    save(tmp_path / "reordered", dict(reversed(tensors.items())), made="elsewhere")
    assert digest(saved) == digest(tmp_path / "sharded") == digest(tmp_path / "reordered")


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_any_change_of_a_tensor_changes_the_digest(saved: Path, tmp_path: Path, change: str) -> None:
    tensors = load_file(saved / FILE)
    name, tensor = "model.norm.weight", tensors.pop("model.norm.weight")
    changed = {
        "value": {name: torch.nextafter(tensor, tensor + 1)},
        "name": {"model.norm.scale": tensor},
        "dtype": {name: tensor.view(torch.int32)},
        "shape": {name: tensor.reshape(2, -1)},
    }[change]
    assert digest(saved) != digest(save(tmp_path / "changed", {**tensors, **changed}))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float16])
def test_a_copy_in_a_wider_dtype_has_the_digest_of_the_original(
    saved: Path, tmp_path: Path, narrow: torch.dtype, wide: torch.dtype
) -> None:
    tensors = {name: tensor.to(narrow) for name, tensor in load_file(saved / FILE).items()}
    if torch.promote_types(narrow, wide) != wide and narrow == torch.bfloat16:  # no value of it is too small
        tensors = {name: torch.where(one.abs() < 1e-3, 0, one) for name, one in tensors.items()}
    original = save(tmp_path / "narrow", tensors)
    copy = save(tmp_path / "wide", {name: tensor.to(wide) for name, tensor in tensors.items()})
    assert digest(original) == digest(copy) != digest(saved)


def test_one_value_that_the_narrower_dtype_lacks_keeps_the_wider_one(saved: Path, tmp_path: Path) -> None:
    tensors = {name: one.bfloat16().float() for name, one in load_file(saved / FILE).items()}
    copy = save(tmp_path / "copy", tensors)
    tensors["model.norm.weight"][3] += 2.0**-20
    other = save(tmp_path / "other", tensors)
    assert digest(copy) != digest(other)
    assert digest(other) == weights_digest([other / FILE])  # as it is stored


def test_tensors_of_several_dtypes_count_as_they_are_stored(saved: Path, tmp_path: Path) -> None:
    tensors = {name: one.bfloat16() for name, one in load_file(saved / FILE).items()}
    norm = tensors["model.norm.weight"].float()
    mixed = save(tmp_path / "mixed", {**tensors, "model.norm.weight": norm})
    assert digest(mixed) == weights_digest([mixed / FILE])


def test_integers_do_not_make_a_checkpoint_mixed(saved: Path, tmp_path: Path) -> None:
    tensors = {name: one.bfloat16() for name, one in load_file(saved / FILE).items()}
    counts = {"counts": torch.arange(5)}
    narrow = save(tmp_path / "narrow", {**tensors, **counts})
    wide = save(tmp_path / "wide", {**{name: one.float() for name, one in tensors.items()}, **counts})
    assert digest(narrow) == digest(wide)


def test_unused_renamed_and_tied_tensors(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / FILE)
    head = tensors["lm_head.weight"]
    more = save(tmp_path / "more", {**tensors, "extra": torch.ones(3), "twice": head.clone()})
    names = {"unused": frozenset({"extra"}), "tied": {"twice": "lm_head.weight"}}
    assert digest(more, **names) == digest(saved)
    only = save(
        tmp_path / "only", {**{k: v for k, v in tensors.items() if k != "lm_head.weight"}, "twice": head}
    )
    assert digest(only, **names) == digest(saved)
    unequal = save(tmp_path / "unequal", {**tensors, "twice": head + 1})
    assert digest(unequal, **names) != digest(saved)
    old = save(tmp_path / "old", {f"old.{name}": tensor for name, tensor in tensors.items()})
    assert digest(old, renamed={f"old.{name}": name for name in tensors}) == digest(saved)


def test_a_file_is_hashed_again_only_when_it_changed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = tensor_digest.tensor_entry
    monkeypatch.setattr(
        tensor_digest, "tensor_entry", lambda tensor, dtype: (hashed.append(dtype), real(tensor, dtype))[1]
    )
    first, count = digest(saved), len(load_file(saved / FILE))
    assert digest(saved) == first and len(hashed) == count
    file = saved / FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert digest(saved) != first and len(hashed) == 2 * count


@pytest.mark.parametrize(
    "entries", [None, [], {}, {"lm_head.weight": None}, {"lm_head.weight": [1, 2, 3]}, "text"], ids=str
)
def test_a_memo_with_other_entries_is_not_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch, entries: object
) -> None:
    expected = digest(saved)
    monkeypatch.setattr(
        tensor_digest, "read_memo", lambda *_: {"entries as stored": entries, "fits BF16": entries}
    )
    assert digest(saved) == expected


@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("<Q", 10**9) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        digest(tmp_path)


def test_a_checkpoint_that_was_cut_short_is_refused(saved: Path) -> None:
    file = saved / FILE
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        digest(saved)
