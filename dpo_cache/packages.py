"""Optional packages: whether they are installed, and the error that names the command that installs them.

No package is imported here, so that a missing one is reported before torch is imported or a model is loaded.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata

from dpo_cache.errors import DpoCacheError, OptionError

RAY_VERSIONS = ((2, 55), (2, 64))  # from, below. 2.64 has no actor options in `map_batches`
# tracker -> its name for pip
TRACKER_PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow-skinny",
}


def is_installed(module: str) -> bool:
    """Whether the module can be found; False where only a folder has its name."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def check_bitsandbytes(option: str, kind: type[DpoCacheError] = OptionError) -> None:
    """Raise an error of this kind unless bitsandbytes is installed, which the option needs."""
    missing = [module for module in ("bitsandbytes", "accelerate") if not is_installed(module)]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise kind(
            f"{option} needs {' and '.join(missing)}, which {are} not installed.\n"
            "Run `pip install 'dpo-cache[quantize]'`."
        )


def check_matplotlib() -> None:
    """Raise `OptionError` unless matplotlib is installed, which `plot` needs."""
    if not is_installed("matplotlib"):
        raise OptionError(
            "`plot` needs matplotlib.\nInstall it with `pip install 'dpo-cache[plot]'`, or leave `plot` out."
        )


def check_ray() -> None:
    """Raise `OptionError` unless Ray is installed in a version that `ray` works with."""
    if not is_installed("ray"):
        raise OptionError(f"`ray` needs Ray, which is not installed.\n{ray_advice()}")
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:  # built from source, for example: importing it shows the version
        return
    check_ray_version(version)


def check_ray_version(version: str) -> None:
    """Raise `OptionError` for a version of Ray that `ray` does not work with."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if not RAY_VERSIONS[0] <= found < RAY_VERSIONS[1]:
        raise OptionError(f"`ray`: Ray {version} is not supported.\n{ray_advice()}")


def ray_advice() -> str:
    """How to install a version of Ray that works."""
    lowest, limit = ("{}.{}".format(*version) for version in RAY_VERSIONS)
    return f'Install it with `pip install "dpo-cache[ray]"`: ray[data]>={lowest},<{limit}.'
