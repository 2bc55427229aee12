"""Scores are published without an index, and indexed without reading them."""

from pathlib import Path

import numpy as np

from dpo_cache.store import open_cache
from dpo_cache.store.score_writer import publish_scores
from tests.store.conftest import make_scores

PLACE = f"references/{'0' * 64}/scores"


def test_what_is_published_is_a_shard_like_any_other(tmp_path: Path) -> None:
    cache, scores, recorded = open_cache(tmp_path / "cache", create=True), make_scores([3, 1, 2]), list[str]()
    name, num_bytes = publish_scores(cache.folder, PLACE, scores, recorded.append)
    assert recorded == [f"{PLACE}/{name}"]
    assert (tmp_path / "cache" / PLACE / name).stat().st_size == num_bytes
    again = publish_scores(cache.folder, PLACE, scores, recorded.append)
    assert again == (name, num_bytes) and len(recorded) == 1, "it was there"
    found = cache.scores("0" * 64).fetch([key for key, _ in scores])
    assert [score.token_logps.tolist() for score in found] == [
        score.token_logps.tolist() for _, score in scores
    ]


def test_an_index_takes_a_shard_of_another_process_from_its_keys(tmp_path: Path) -> None:
    cache, scores = open_cache(tmp_path / "cache", create=True), make_scores([3, 1, 2])
    index = cache.scores("0" * 64)
    name, _ = publish_scores(cache.folder, PLACE, scores)
    keys = np.array([key for key, _ in scores], "S16")
    assert not index.contains(keys).any()
    index.add_published(name, keys)
    assert index.contains(keys).all()
    index.add_published(name, keys)
    index.refresh()
    assert len(index) == 3
    assert index.fetch(keys[1:2])[0].token_logps.tolist() == scores[1][1].token_logps.tolist()
