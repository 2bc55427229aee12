"""The versions on which a result depends, for `--version`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from dpo_cache import __version__

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "pyarrow", "safetensors")
OPTIONAL = ("bitsandbytes", "ray", "trl")


def version_lines() -> Iterator[str]:
    """Yield `NAME VERSION`, dpo-cache first; optional libraries only if they are installed. Imports none."""
    yield f"dpo-cache {__version__}"
    yield f"python {platform.python_version()} ({platform.system()} {platform.machine()})"
    for name in (*LIBRARIES, *OPTIONAL):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            if name in LIBRARIES:
                yield f"{name} is not installed"
