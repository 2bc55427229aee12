import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.stored_tensors import StoredTensors

TENSORS = {
    "matrix": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(4),
    "nothing": torch.empty(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_tensors_are_read_as_they_were_saved_and_their_bytes_are_counted(path: Path) -> None:
    stored = StoredTensors([path])
    assert stored.tensors.keys() == TENSORS.keys() and stored.num_bytes_read == 0
    for name, tensor in TENSORS.items():
        found = stored.tensors[name][...]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert stored.tensors[name].get_shape() == list(tensor.shape)
        assert stored.tensors[name].on_meta().shape == tensor.shape
    assert stored.num_bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())
    stored.close()


def test_a_tensor_can_be_read_into_a_buffer(path: Path) -> None:
    stored = StoredTensors([path])
    buffer = torch.zeros(100, dtype=torch.uint8)
    found = stored.tensors["matrix"].read(buffer)
    assert torch.equal(found, TENSORS["matrix"]) and found.data_ptr() == buffer.data_ptr()
    assert not buffer[60:].any()
    stored.close()


def test_the_last_file_that_has_a_name_counts(path: Path, tmp_path: Path) -> None:
    save_file({"half": torch.zeros(2)}, tmp_path / "b.safetensors")
    stored = StoredTensors([path, tmp_path / "b.safetensors"])
    assert torch.equal(stored.tensors["half"][...], torch.zeros(2))
    stored.close()


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header does not fit"),
        (bytes([255]) * 8, "header does not fit"),
        ((4).to_bytes(8, "little") + b"oops", "Expecting value"),
        (with_header([1]), "not a whole safetensors file"),
        (with_header({"a": {**ENTRY, "dtype": "F2"}}), "numbers of the kind F2"),
        (with_header({"a": {**ENTRY, "shape": [3]}}), "shape and its number of bytes disagree"),
        (with_header({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}), "ends before its last tensor"),
    ],
)
def test_what_is_no_whole_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        StoredTensors([tmp_path / "a.safetensors"])
    assert "Download or save the model again." in str(raised.value)


def test_a_file_that_is_cut_while_it_is_open_is_seen(path: Path) -> None:
    stored = StoredTensors([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="ends before its last tensor does"):
        for tensor in stored.tensors.values():
            tensor.read()
    stored.close()
