"""How good a policy is on a pair set: its log-probs beside the cached ones. This room never loads a
reference, and never trains.
"""

from dpo_cache.evaluation.report import EvalReport
from dpo_cache.evaluation.run import evaluate

__all__ = ["EvalReport", "evaluate"]
