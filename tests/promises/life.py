"""A cache's life: every kind of change and of reading, for tests that disturb it at each step."""

from __future__ import annotations

from dpo_cache.store import Cache
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.types import ScoredPair
from tests.store.conftest import make_pairs, make_scores, plain

DETAILS = {"name": "pairs", "split": "train", "reference": "0" * 64, "pairs_digest": "1" * 64}
# in parts of two pairs these share the first part
FIRST, SECOND = make_pairs(5), [*make_pairs(2), *make_pairs(3, first_row=50)]


def live(folder: LocalFolder) -> None:
    """Make a cache, score into it, publish a pair set and replace it, remove its old parts, remove
    another.
    """
    cache = Cache(folder.root, create=True)
    cache.folder = folder
    assert folder.exists("format.json") in (True, False)  # as every opening asks
    scores = cache.scores(cache.publish_reference({"weights": "w"}, {"model": "m"}))
    scores.publish(make_scores([1, 2]))
    publish_pairs(cache, "pairs", FIRST)
    scores.publish(make_scores([3]))
    publish_pairs(cache, "other", FIRST[:1])
    old = [part["file"] for part in cache.pairs("pairs").manifest["parts"]]
    publish_pairs(cache, "pairs", SECOND)
    kept = [part["file"] for part in cache.pairs("pairs").manifest["parts"]]
    for part in sorted(set(old) - set(kept)):
        folder.remove(f"pairs/pairs/train/{part}")
    for name in ("manifest.json", cache.pairs("other").manifest["parts"][0]["file"]):
        folder.remove(f"pairs/other/train/{name}")


def publish_pairs(cache: Cache, name: str, pairs: list[ScoredPair]) -> None:
    writer = cache.write_pairs(name, "train")
    writer.add(pairs)
    writer.finish({**DETAILS, "name": name})


def read_back(folder: LocalFolder) -> None:
    """See that the cache holds what `live` put there, and no less."""
    cache = Cache(folder.root)
    cache.folder = folder
    reference = cache.find_reference("")
    assert cache.read_reference(reference)["provenance"] == {"model": "m"}
    index, expected = cache.scores(reference), make_scores([1, 2, 3])
    for score, (_, wanted) in zip(index.fetch([key for key, _ in expected]), expected, strict=True):
        assert score.token_logps.tolist() == wanted.token_logps.tolist()
    assert [plain(pair) for pair in cache.pairs("pairs")] == [plain(pair) for pair in SECOND]
    assert len(index) == 3
