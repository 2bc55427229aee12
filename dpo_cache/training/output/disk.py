"""The disk that a run needs for its model and its checkpoints."""

from __future__ import annotations

from pathlib import Path

from dpo_cache.errors import TrainingError, shown_bytes
from dpo_cache.options.train import TrainOptions
from dpo_cache.store.folders.local import free_bytes


def needed_bytes(
    options: TrainOptions, *, trained: int, whole: int, towers: int = 0, is_sharded: bool = False
) -> int:
    """The most bytes that a run has on the disk at one time, for a model with so many bytes of trained
    weights, of all weights, and of towers that are saved with a whole model.
    """
    # A checkpoint is weights and two moments. For a short time there is one more than are kept.
    num_checkpoints = options.keep + 1 if options.save_every and options.keep else 0
    # there are two folders best/ if the last checkpoint names another policy as the best
    keeps_best = 2 * (options.eval_every is not None)
    needed = trained * (3 * num_checkpoints + keeps_best) + (whole if options.merge_adapter else trained)
    needed += towers * (1 if options.merge_adapter else 1 + num_checkpoints + keeps_best)
    return needed + (trained if is_sharded else 0)  # the joined tensors, before they are saved


def check_space(folder: Path, needed: int) -> None:
    """Raise `TrainingError` if so many bytes do not fit on the folder's disk."""
    free = free_bytes(folder)
    if free is not None and needed > free:
        raise TrainingError(
            f"{folder}: {shown_bytes(needed)} are needed for the model and its checkpoints, "
            f"{shown_bytes(free)} are free.\n"
            "Free some space or choose another `output`."
        )
