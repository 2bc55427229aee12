"""data -> lm -> store: run the frozen reference once over a data set."""

from dpo_cache.precomputing.report import PrecomputeReport
from dpo_cache.precomputing.run import precompute

__all__ = ["PrecomputeReport", "precompute"]
