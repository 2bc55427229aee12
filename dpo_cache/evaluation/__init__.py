"""Measures a policy on a pair set: its log-probs are compared with the cached ones. This package never loads
a reference, and never trains.
"""

from dpo_cache.evaluation.report import EvalReport
from dpo_cache.evaluation.run import evaluate

__all__ = ["EvalReport", "evaluate"]
