"""One cache, several runs, one table."""

from dpo_cache.sweeping.run import SweepProgress, SweepReport, sweep

__all__ = ["SweepProgress", "SweepReport", "sweep"]
