"""A small cache of every kind of file, and all that a training run reads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_cache.store import completion_key, open_cache
from dpo_cache.store import pairs as pairs_module
from dpo_cache.store.format import shards
from dpo_cache.store.upkeep.merge_shards import merge_shards, write_sorted_shards
from tests.store.conftest import make_pairs, plain

IDENTITY = {
    "scoring": 1,
    "weights": "5e" * 32,
    "config": {"hidden_size": 32, "model_type": "llama"},
    "dtype": "float32",
}
NUM_PAIRS = 9


def make_small_cache(root: Path) -> Path:
    """A reference, a shard as it was scored, a merged one of several row groups, and a pair set of two
    parts.
    """
    pairs = make_pairs(NUM_PAIRS)
    scored = {completion_key(scored.pair.chosen): scored.ref_chosen for scored in pairs}
    scored |= {completion_key(scored.pair.rejected): scored.ref_rejected for scored in pairs}
    scores = list(scored.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_BYTES", 300)
        patch.setattr(pairs_module, "PART_PAIRS", 6)
        cache = open_cache(root, create=True)
        reference = cache.publish_reference(IDENTITY, {"model": "example/tiny", "revision": "main"})
        cache.scores(reference).publish(scores[:12])
        place = f"references/{reference}/scores"
        merged = list(
            write_sorted_shards(
                cache.folder,
                place,
                merge_shards(cache.folder, [f"{place}/{name}" for name in cache.folder.names(place)]),
            )
        )
        for name in set(cache.folder.names(place)) - set(merged):
            cache.folder.remove(f"{place}/{name}")
        cache.scores(reference).publish(scores[12:])
        writer = cache.write_pairs("dialogues", "train")
        writer.add(pairs)
        writer.finish(
            {"name": "dialogues", "split": "train", "reference": reference, "pairs_digest": "1" * 64}
        )
    return root


def read_small_cache(root: Path) -> dict[str, Any]:
    """Everything in it, as numbers that can be compared."""
    keys = [
        completion_key(side)
        for scored in make_pairs(NUM_PAIRS)
        for side in (scored.pair.chosen, scored.pair.rejected)
    ]
    cache = open_cache(root)
    (reference,) = cache.references()
    return {
        "reference": cache.read_reference(reference),
        "scores": [score.token_logps.tolist() for score in cache.scores(reference).fetch(keys)],
        "pairs": [plain(scored) for scored in cache.pairs("dialogues")],
    }


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
