"""The digest of a checkpoint's tensors: by name, dtype, shape and bytes, in whichever files they are.

`weights_digest` is the sha256 over the lines `name dtype shape sha256-of-bytes`, sorted by name. Checkpoints
of one model that differ in form get one digest:

- names: each tensor has the name under which transformers saves it, and a tensor that the model does not load
  is left out (see `tensor_names.py`);
- dtypes: where all tensors are stored in one dtype, but a narrower one (BF16, or else F16, or else F32) holds
  all of their values exactly, they count in that. So a float32 copy of a bfloat16 checkpoint has its digest.

For a checkpoint as transformers saves it, and which is no such copy, this is the digest of its tensors as
they are stored. It does not depend on the dtype of the forward pass, an entry of its own in an identity: a
float32 checkpoint and its rounded copy in bfloat16 are two models, though in bfloat16 they compute the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.memo import read_memo, write_memo
from dpo_cache.lm.model.unchanged import stamp

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NARROWER = {"F64": ("BF16", "F16", "F32"), "F32": ("BF16", "F16"), "F16": ("BF16",)}
WITHOUT_FRACTION = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

Entry = tuple[str, list[int], str]  # dtype, shape, sha256 of the bytes


@dataclass(frozen=True)
class TensorNames:
    """How a model names the tensors in its files; see `tensor_names.py`."""

    renamed: dict[str, str] = field(default_factory=dict)  # name in a file -> name in a saved model
    unused: frozenset[str] = frozenset()  # names in a file that are not loaded
    tied: dict[str, str] = field(
        default_factory=dict
    )  # saved name -> that of the tensor it shares weights with


def weights_digest(files: list[Path], names: TensorNames | None = None) -> str:
    """Hex sha256 over all tensors as they are stored or, with `names`, as a model counts them.

    Raises `ModelError` for a file that is no safetensors file.
    """
    opened = [_TensorFile(path) for path in files]
    if names is None:
        return digest_of({name: entry for file in opened for name, entry in file.entries().items()})
    dtype = _narrower_dtype(opened, names.unused)
    entries = {name: entry for file in opened for name, entry in file.entries(dtype).items()}
    return digest_of(_rename({name: entries[name] for name in entries.keys() - names.unused}, names))


def digest_of(entries: dict[str, Entry]) -> str:
    """Hex sha256 over the tensors' lines, sorted by name."""
    lines = [f"{name} {dtype} {shape} {digest}" for name, (dtype, shape, digest) in sorted(entries.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensor_entry(tensor: torch.Tensor, dtype: str) -> Entry:
    """Dtype, shape and digest of one tensor."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return dtype, list(tensor.shape), hashlib.sha256(values.data).hexdigest()


def float32_digest(files: list[Path]) -> str:
    """Hex sha256 over all tensors, cast to float32."""
    return digest_of(
        {name: entry for path in files for name, entry in _TensorFile(path).entries("F32").items()}
    )


def tensor_shapes(files: list[Path]) -> dict[str, list[int]]:
    """The shape of each tensor in the files. Raises `ModelError`."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        with _TensorFile(path).open() as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def tensor_names_in(files: list[Path]) -> list[str]:
    """The names of the tensors in the files, sorted. Raises `ModelError`."""
    return sorted({name for path in files for name in _TensorFile(path).dtypes})


def _rename(entries: dict[str, Entry], names: TensorNames) -> dict[str, Entry]:
    """The entries under the names of a saved model, where a tensor with two names has one entry."""
    renamed = {names.renamed[name]: entry for name, entry in entries.items() if name in names.renamed}
    renamed |= {name: entry for name, entry in entries.items() if name not in names.renamed}
    for name, source in names.tied.items():
        if name in renamed and renamed.get(source, renamed[name]) == renamed[name]:
            renamed[source] = renamed.pop(name)
    return renamed


def _narrower_dtype(files: list[_TensorFile], unused: frozenset[str]) -> str | None:
    """The dtype that holds the values of all tensors, where they have one dtype that is wider; or None."""
    used = {dtype for file in files for name, dtype in file.dtypes.items() if name not in unused}
    floats = used - set(WITHOUT_FRACTION)
    if len(floats) != 1:
        return None
    for narrower in NARROWER.get(floats.pop(), ()):
        if all(file.fits(narrower, unused) for file in files):
            return narrower
    return None


class _TensorFile:
    """A safetensors file, whose digests are remembered under its path, size, times and inode."""

    def __init__(self, path: Path):
        self.path, self._stamp = path, stamp(path)
        self._memo = read_memo(f"tensors {path.resolve()}", self._stamp)
        with self.open() as file:
            self.dtypes = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118

    def entries(self, dtype: str | None = None) -> dict[str, Entry]:
        """An entry for each tensor: as it is stored, or cast to a dtype, if it is a floating-point one."""
        key = f"entries {dtype or 'as stored'}"
        known = _parsed(self._memo.get(key))
        if known is None or known.keys() != self.dtypes.keys():
            known = {
                name: tensor_entry(tensor.to(FLOATS[dtype]), dtype)
                if dtype and stored in FLOATS
                else tensor_entry(tensor, stored)
                for name, tensor, stored in self._tensors()
            }
            self._remember(key, known)
        return known

    def fits(self, narrower: str, unused: frozenset[str]) -> bool:
        """Return whether the narrower dtype holds all values of the tensors exactly."""
        tried = sorted(self.dtypes.keys() - unused)
        key = f"fits {narrower} {hashlib.sha256(repr(tried).encode()).hexdigest()}"
        known = self._memo.get(key)
        if not isinstance(known, bool):
            known = all(
                _equal_bits(tensor, tensor.to(FLOATS[narrower]).to(tensor.dtype))
                for name, tensor, stored in self._tensors()
                if stored in FLOATS and name not in unused
            )
            self._remember(key, known)
        return known

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor, str]]:
        """Name, values and dtype of each tensor. The file is mapped again for each, so that no more than one
        tensor's pages count as memory of this process.
        """
        for name, dtype in self.dtypes.items():
            with self.open() as file:
                yield name, file.get_tensor(name), dtype

    def _remember(self, key: str, value: Any) -> None:
        self._memo[key] = value
        write_memo(f"tensors {self.path.resolve()}", self._stamp, self._memo)

    @contextmanager
    def open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ModelError(
                f"{self.path}: not a whole safetensors file ({error}).\nDownload or save the model again."
            ) from error


def _equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[one.dtype]))


def _parsed(entries: Any) -> dict[str, Entry] | None:
    """The entries of a memo; None where it holds none."""
    if not isinstance(entries, dict):
        return None
    is_valid = all(
        isinstance(entry, list | tuple) and [type(part) for part in entry] == [str, list, str]
        for entry in entries.values()
    )
    return {name: (entry[0], entry[1], entry[2]) for name, entry in entries.items()} if is_valid else None
