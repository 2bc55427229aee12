"""dpo-cache: preference fine-tuning without a reference model in memory.

    data          rows of any preference data set -> token ids
    lm            a causal LM as a function: completions -> log-probs
    store         log-probs <-> shared, immutable Parquet shards
    precomputing  data -> lm -> store: run the frozen reference once
    exchange      pair sets -> files for other tools, and log-probs made elsewhere -> pair sets
    training      store -> lm -> optimizer: train the policy alone
    evaluation    store -> lm -> report: how good a policy is on a pair set
    sweeping      several trainings from one cache, a process each
    reporting     runs -> tables and plots
    footprint     what a training step will hold in memory, counted without running it

In a few lines:

    import dpo_cache

    dpo_cache.precompute("path/to/model", "pairs.jsonl", "cache")
    pairs = dpo_cache.open_cache("cache").pairs("pairs")
    dpo_cache.train("cache", "run", pairs="pairs", beta=0.1)
    dpo_cache.evaluate("cache", "heldout", "run/model", beta=0.1).accuracy
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_cache.evaluation import EvalReport, evaluate
    from dpo_cache.exchange import ExportReport, ImportReport, export_pairs, import_pairs
    from dpo_cache.losses.reference_losses import preference_loss
    from dpo_cache.precomputing.run import PrecomputeReport, precompute
    from dpo_cache.store import open_cache
    from dpo_cache.sweeping import SweepReport, sweep
    from dpo_cache.training.loop import TrainReport, train
    from dpo_cache.types import Completion, Pair, Score, ScoredPair

__version__ = "0.1.0"

# Loaded when first used: torch takes seconds, `dpo-cache --help` should not.
_HOMES = {
    "precompute": "dpo_cache.precomputing.run",
    "PrecomputeReport": "dpo_cache.precomputing.run",
    "export_pairs": "dpo_cache.exchange",
    "ExportReport": "dpo_cache.exchange",
    "import_pairs": "dpo_cache.exchange",
    "ImportReport": "dpo_cache.exchange",
    "open_cache": "dpo_cache.store",
    "evaluate": "dpo_cache.evaluation",
    "EvalReport": "dpo_cache.evaluation",
    "train": "dpo_cache.training.loop",
    "TrainReport": "dpo_cache.training.loop",
    "sweep": "dpo_cache.sweeping",
    "SweepReport": "dpo_cache.sweeping",
    "preference_loss": "dpo_cache.losses.reference_losses",
    "Completion": "dpo_cache.types",
    "Pair": "dpo_cache.types",
    "Score": "dpo_cache.types",
    "ScoredPair": "dpo_cache.types",
}

__all__ = [
    "Completion",
    "EvalReport",
    "ExportReport",
    "ImportReport",
    "Pair",
    "PrecomputeReport",
    "Score",
    "ScoredPair",
    "SweepReport",
    "TrainReport",
    "evaluate",
    "export_pairs",
    "import_pairs",
    "open_cache",
    "precompute",
    "preference_loss",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpo_cache' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
