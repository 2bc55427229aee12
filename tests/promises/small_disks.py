"""A training run on a real disk that becomes full at another place each time, and then has room again.

Run below `unshare -rm`, which lets it mount disks; the arguments are a cache and an empty folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dpo_cache
from dpo_cache.errors import TrainingError
from dpo_cache.files.claim import CLAIM
from dpo_cache.training.gradient_check import GradientCheck
from dpo_cache.training.output import run_folder

OPTIONS = {
    "pairs": "pairs",
    "batch_size": 4,
    "save_every": 1,
    "max_steps": 2,
    "step_zero": "off",
    "deterministic": True,
}
SIZES = range(12, 600, 12)  # KiB


def main() -> None:
    cache, place = sys.argv[1], Path(sys.argv[2])
    GradientCheck.problem = lambda *_: ""  # type: ignore[method-assign]
    run_folder.free_bytes = lambda _: None  # type: ignore[assignment]  else it is refused before it begins
    refused: list[str] = []
    for size in SIZES:
        mount("-o", f"size={size}k", "tmpfs", str(place), kind="tmpfs")
        run = place / "run"
        try:
            dpo_cache.train(cache, run, log=lambda _: None, **OPTIONS)
        except TrainingError as error:
            first, second = str(error).split("\n")
            assert first.startswith(("cannot save ", "cannot write ")), error
            assert second.startswith("Free some space. "), error
            refused.append(first.split(": ")[0].rsplit("/", 1)[1])
            left = (
                [path.name for path in run.rglob("*") if path.name.endswith(".tmp")] if run.exists() else []
            )
            assert left == [], left
        else:
            print(f"{size} KiB suffice; refused: {' '.join(dict.fromkeys(refused))}")
            break
        finally:
            mount("-o", "remount,size=64m", str(place))
        resume = (run / "config.json").exists()
        assert dpo_cache.train(cache, run, resume=resume, log=lambda _: None, **OPTIONS).finished
        assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "model"]
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert CLAIM not in [path.name for path in run.iterdir()]


def mount(*arguments: str, kind: str | None = None) -> None:
    subprocess.run(["mount", *(["-t", kind] if kind else []), *arguments], check=True)


if __name__ == "__main__":
    main()
