"""Every operation that changes files below a folder, counted, in a process that kills itself at one of them.

Counted are: a file is created or opened to be written, each write (before it, and when half of it is written),
a rename, an unlink, and the making and removing of folders, by Python or by the libraries in Rust that save
weights and tokenizers. Syncs are not counted, nor carried out: a kill before one leaves what a kill after it
leaves. It is installed into a forked process, and never removed.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers.tokenization_utils_tokenizers import TokenizersBackend

_real_open, _os_open, _os_write, _os_unlink = io.open, os.open, os.write, os.unlink


class Operations:
    """The operations below a folder so far; the process dies instead of the one of number `die_at`."""

    def __init__(self, root: Path, die_at: int | None = None):
        self.root, self.die_at, self.done = str(root), die_at, list[str]()
        self.descriptors: set[int] = set()  # opened to be written, by `os.open`

    def meet(self, operation: str, path: Any) -> None:
        self.done.append(f"{operation} {os.path.relpath(os.fspath(path), self.root)}")
        if len(self.done) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def has(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.root)

    def install(self) -> None:
        for name in ("rename", "replace", "mkdir", "unlink", "remove", "rmdir"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.open, os.write, os.fsync = self._os_open, self._os_write, lambda descriptor: None  # type: ignore[assignment]
        builtins.open = io.open = self._open  # type: ignore[assignment]
        safetensors.torch.serialize_file = self._whole_file(safetensors.torch.serialize_file, at=1)
        real = TokenizersBackend.backend_tokenizer.fget  # type: ignore[attr-defined]
        TokenizersBackend.backend_tokenizer = property(lambda tokenizer: _Saving(real(tokenizer), self))  # type: ignore[assignment]

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, dir_fd: int | None = None, **options: Any) -> Any:
            if dir_fd is not None:  # of `shutil.rmtree`
                options["dir_fd"] = dir_fd
                full = Path(f"/proc/self/fd/{dir_fd}").readlink() / path
            else:
                full = path
            if self.has(full):
                self.meet(name, full)
            return real(path, *more, **options)

        return call

    def _whole_file(self, real: Callable[..., Any], *, at: int) -> Callable[..., Any]:
        """A library's function that writes the file of its argument number `at`."""

        def call(*arguments: Any, **options: Any) -> None:
            path = arguments[at]
            if not self.has(path):
                return real(*arguments, **options)
            self.meet("save", path)
            real(*arguments, **options)
            os.truncate(path, Path(path).stat().st_size // 2)
            self.meet("half-saved", path)
            _os_unlink(path)
            real(*arguments, **options)

        return call

    def _os_open(self, path: Any, flags: int, *more: Any, **options: Any) -> int:
        changes = flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and self.has(path)
        if changes:
            self.meet("open", path)
        descriptor = _os_open(path, flags, *more, **options)
        if changes:
            self.descriptors.add(descriptor)
        return descriptor

    def _os_write(self, descriptor: int, content: bytes) -> int:
        if descriptor not in self.descriptors:
            return _os_write(descriptor, content)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.meet("write", path)
        half = _os_write(descriptor, content[: len(content) // 2])
        self.meet("half-written", path)
        return half + _os_write(descriptor, content[half:])

    def _open(self, file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if not self.has(file) or not set(mode) & set("wxa+"):
            return _real_open(file, mode, *more, **options)
        self.meet("open", file)
        raw = _CountedFile(file, mode.replace("b", "").replace("t", ""), self)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


class _CountedFile(io.FileIO):
    def __init__(self, path: Any, mode: str, operations: Operations):
        super().__init__(path, mode)
        self._operations = operations

    def write(self, content: Any) -> int:
        content = bytes(content)
        self._operations.meet("write", self.name)
        half = super().write(content[: len(content) // 2])
        self._operations.meet("half-written", self.name)
        return half + super().write(content[half:])


class _Saving:
    """A tokenizer of the library in Rust; only its `save` is another."""

    def __init__(self, real: Any, operations: Operations):
        self._real = real
        self.save = operations._whole_file(real.save, at=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
