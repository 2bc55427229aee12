"""Which completions a reference has scored, and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError, MissingFileError, NotInCacheError
from dpo_cache.store.files import Folder
from dpo_cache.store.keys import KEY_BYTES
from dpo_cache.store.shards import (
    REMEDY,
    SHARD_SCHEMA,
    check_content,
    decode_shard,
    encode_shard,
    keys_of,
    name_by_content,
    open_parquet,
)
from dpo_cache.types import Score

KEY_DTYPE = f"S{KEY_BYTES}"
LISTINGS = 5  # of a folder that others compact meanwhile


class ScoreIndex:
    """The scores of one reference: a set of shards that only grows.

    Opening reads the keys alone (16 bytes a completion in memory, plus 12 for where it lies); values are
    read, and their file's digest checked, when they are fetched.
    """

    def __init__(self, folder: Folder, place: str):
        self._folder, self._place = folder, place
        self._shards: list[str] = []
        self._keys = np.empty(0, KEY_DTYPE)
        self._where = np.empty((0, 2), np.int32)  # shard, row: parallel to _keys, which is sorted
        self.refresh()

    def __len__(self) -> int:
        """Distinct completions."""
        return len(self._keys)

    def refresh(self) -> None:
        """See the shards that were published, by anyone, since the index was opened."""
        known, keys = set(self._shards), dict[str, np.ndarray]()
        for attempt in range(1, LISTINGS + 1):
            names = [name for name in self._folder.names(self._place) if name.endswith(".parquet") and name not in known and name not in keys]
            self._folder.prefetch([f"{self._place}/{name}" for name in names])
            try:
                keys |= {name: self._read_keys(name) for name in names}
                break
            except MissingFileError:  # compacted or collected since it was listed: what holds it now is in the next listing
                if attempt == LISTINGS:
                    raise
        self._add(keys)

    def contains(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Which of the keys are scored: bool `[len(keys)]`."""
        wanted = np.array(keys, KEY_DTYPE)
        if not len(self._keys):
            return np.zeros(len(wanted), bool)
        return self._keys[self._positions(wanted)] == wanted

    def fetch(self, keys: Sequence[bytes] | np.ndarray) -> list[Score]:
        """The scores, in the order of the keys. Each shard that holds one of them is read once."""
        present = self.contains(keys)
        if not present.all():
            missing = bytes(keys[int(np.argmin(present))])
            raise NotInCacheError(
                f"{self._folder}/{self._place}: {int((~present).sum())} of {len(keys)} completions are not scored, "
                f"the first is {missing.ljust(KEY_BYTES, bytes(1)).hex()}.\nRun the `dpo-cache precompute` that made this cache again."
            )
        where = self._where[self._positions(np.array(keys, KEY_DTYPE))]
        found: list[Score | None] = [None] * len(keys)
        for shard in np.unique(where[:, 0]):
            scores = self._read_scores(self._shards[shard])
            for position in np.flatnonzero(where[:, 0] == shard):
                values = scores[where[position, 1]].token_logps
                found[position] = Score(values.copy())  # a view would keep the whole shard in memory
        return found  # type: ignore[return-value]

    def publish(self, scores: Sequence[tuple[bytes, Score]]) -> int:
        """Store the scores as one new shard, durably, and index it. Returns the bytes written."""
        content = encode_shard(scores)
        name = name_by_content(content)
        self._folder.publish(f"{self._place}/{name}", content)
        if name not in self._shards:
            self._add({name: np.array([key for key, _ in scores], KEY_DTYPE)})
        return len(content)

    def _positions(self, wanted: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)

    def _add(self, keys_by_shard: dict[str, np.ndarray]) -> None:
        keys, where = [self._keys], [self._where]
        for shard, shard_keys in enumerate(keys_by_shard.values(), start=len(self._shards)):
            keys.append(shard_keys)
            where.append(np.stack([np.full(len(shard_keys), shard), np.arange(len(shard_keys))], axis=1).astype(np.int32))
        self._shards.extend(keys_by_shard)
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._where = np.concatenate(where)[first]

    def _read_keys(self, name: str) -> np.ndarray:
        place = f"{self._folder}/{self._place}/{name}"
        file = open_parquet(self._folder.open_parquet(f"{self._place}/{name}"), SHARD_SCHEMA, place)
        try:
            keys = keys_of(file.read(columns=["key"]).column("key")).copy()
        except (pa.ArrowException, OSError) as error:
            raise CorruptShardError(f"{place}: its keys are not readable ({error}). {REMEDY}") from error
        if len(keys) != file.metadata.num_rows or not len(keys):
            raise CorruptShardError(f"{place}: {file.metadata.num_rows} rows promised, {len(keys)} keys read. {REMEDY}")
        return keys

    def _read_scores(self, name: str) -> list[Score]:
        place = f"{self._folder}/{self._place}/{name}"
        content = self._folder.read(f"{self._place}/{name}")
        check_content(content, name, place)
        return decode_shard(content, place)[1]
