"""Tensors in safetensors files, each read when it is needed, into memory that the caller may give.

Reads copy from the file. A mapped file would count its touched pages as resident memory of the process, up to
the whole checkpoint. Reading releases the GIL, so that a thread can read while the model computes.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from dpo_cache.errors import ModelError, first_line

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
LENGTH_BYTES = 8  # bytes of the header's length, a little-endian number


class StoredTensors:
    """All tensors of some files by name; of a name in several files the last one, as in transformers.

    Raises `ModelError` for a file that is no safetensors file, and for one that ends early.
    """

    def __init__(self, paths: list[Path]):
        self.num_bytes_read = 0
        self._files = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115  (see `close`)
        self._lock = Lock()
        self.tensors: dict[str, StoredTensor] = {}
        try:
            for path, file in zip(paths, self._files, strict=True):
                self.tensors |= self._read_header(path, file)
        except ModelError:
            self.close()
            raise

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _read_header(self, path: Path, file: io.FileIO) -> dict[str, StoredTensor]:
        try:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size = path.stat().st_size
            if not 0 < length <= size - LENGTH_BYTES:
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            start = LENGTH_BYTES + length
            found = {name: self._entry(path, file, start, entry) for name, entry in header.items()}
            if any(one.end > size for one in found.values()):
                raise ValueError("it ends before its last tensor does")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path}: not a whole safetensors file ({first_line(error)}).\n"
                "Download or save the model again."
            ) from error
        return found

    def _entry(self, path: Path, file: io.FileIO, start: int, entry: dict[str, Any]) -> StoredTensor:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"it holds numbers of the kind {entry['dtype']}")
        begin, end = entry["data_offsets"]
        tensor = StoredTensor(self, path, file, start + begin, entry["dtype"], tuple(entry["shape"]))
        if tensor.end != start + end:
            raise ValueError("a tensor's shape and its number of bytes disagree")
        return tensor

    def read_into(self, target: torch.Tensor, tensor: StoredTensor) -> None:
        """Fill a flat uint8 tensor of the host with the stored bytes."""
        rest = memoryview(target.numpy())  # type: ignore[arg-type]
        with self._lock:
            tensor.file.seek(tensor.start)
            while len(rest):
                num_read = tensor.file.readinto(rest)
                if not num_read:
                    raise ModelError(
                        f"{tensor.path}: ends before its last tensor does.\nDownload or save the model again."
                    )
                rest = rest[num_read:]
                self.num_bytes_read += num_read


class StoredTensor:
    """One tensor, not yet read; `tensor[...]` reads it, as from a slice of the safetensors library."""

    def __init__(
        self, owner: StoredTensors, path: Path, file: io.FileIO, start: int, name: str, shape: tuple[int, ...]
    ):
        self._owner, self.path, self.file, self.start = owner, path, file, start
        self._name, self.dtype, self.shape = name, DTYPES[name], torch.Size(shape)
        self.num_bytes = math.prod(shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.num_bytes

    def get_dtype(self) -> str:
        return self._name

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in memory of its own, or at the beginning of a flat uint8 buffer."""
        if buffer is None:
            buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        content = buffer[: self.num_bytes]
        self._owner.read_into(content, self)
        return content.view(self.dtype).view(self.shape)

    def on_meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")
