"""dpo-cache: preference fine-tuning without a reference model in memory.

    data          rows of any preference data set -> token ids
    lm            a causal LM as a function: completions -> log-probs
    store         log-probs <-> shared, immutable Parquet shards
    precomputing  data -> lm -> store: run the frozen reference once
    exchange      pair sets -> files for other tools, and log-probs made elsewhere -> pair sets
    training      store -> lm -> optimizer: train only the policy
    evaluation    store -> lm -> report: how good a policy is on a pair set
    sweeping      several trainings from one cache, a process each
    reporting     runs -> tables and plots
    planning      what a run will need: memory, counted without running it, time and disk

In a few lines:

    import dpo_cache

    dpo_cache.precompute("path/to/model", "pairs.jsonl", "cache")
    pairs = dpo_cache.open_cache("cache").pairs("pairs")
    dpo_cache.train("cache", "run", pairs="pairs", beta=0.1)
    dpo_cache.evaluate("cache", "heldout", "run/model", beta=0.1).accuracy

Every option is a keyword argument: `help(dpo_cache.train)` lists them. Functions write to the terminal only
with `progress=True`; their reports list remarks. `docs/python.md` has an example of each name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where each public name is defined. Modules are imported when a name is first used: torch takes seconds.
# Editors and type checkers read __init__.pyi, which `python -m tests.write_stub` writes from these names.
_MODULES = {
    "dpo_cache.errors": (
        "CacheError", "CorruptShardError", "DataError", "DpoCacheError", "FormatError", "MissingFileError",
        "ModelError", "NewerFormatError", "NotInCacheError", "OptionError", "OtherRankError",
        "ShapeError", "StepZeroError", "StorageError", "TrainingError", "UnknownOptionError",
    ),
    "dpo_cache.evaluation": ("EvalReport", "evaluate"),
    "dpo_cache.exchange": ("ExportReport", "ImportReport", "export_pairs", "import_pairs"),
    "dpo_cache.losses.reference_losses": ("preference_loss",),
    "dpo_cache.planning.plan": ("plan",),
    "dpo_cache.planning.report": ("PlanReport",),
    "dpo_cache.precomputing": ("PrecomputeReport", "precompute"),
    "dpo_cache.store": ("Cache", "PairSet", "open_cache"),
    "dpo_cache.store.upkeep.compact": ("Compacted",),
    "dpo_cache.store.upkeep.copy": ("TransferReport",),
    "dpo_cache.store.upkeep.merge": ("MergeReport",),
    "dpo_cache.store.upkeep.verify": ("VerifyReport",),
    "dpo_cache.sweeping": ("SweepReport", "sweep"),
    "dpo_cache.training.batches": ("TrainingBatch", "training_batches"),
    "dpo_cache.training.loop": ("train",),
    "dpo_cache.training.output.report": ("TrainReport",),
    "dpo_cache.types": ("Completion", "Pair", "Score", "ScoredPair"),
    "dpo_cache.upkeep": ("compact", "merge", "pull", "push", "verify"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dpo_cache' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
