"""Log-probs and token ids in shared, immutable Parquet files. Nothing in this room loads torch."""

from dpo_cache.store.cache import Cache, open_cache
from dpo_cache.store.format.keys import completion_key
from dpo_cache.store.index import ScoreIndex
from dpo_cache.store.pairs import PairSet, PairSetWriter

__all__ = ["Cache", "PairSet", "PairSetWriter", "ScoreIndex", "completion_key", "open_cache"]
