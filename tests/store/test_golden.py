"""A small cache of every released format, readable forever: `tests/golden/format-<version>[-<letter>]/`.

format-1 was made once, by version 0.1.0 with pyarrow 26, and is never written again:

    cache = open_cache("tests/golden/format-1", create=True)
    reference = cache.publish_reference(IDENTITY, PROVENANCE)
    cache.scores(reference).publish([(completion_key(completion), score) for the three of COMPLETIONS and
    TOKEN_LOGPS]) writer = cache.write_pairs("golden", "train")
    writer.add([ScoredPair(Pair(0, one, two), ...), ScoredPair(Pair(2, one, three), ...)])
    writer.finish({"name": "golden", "split": "train", "reference": reference, "pairs_digest": ...,
    **DETAILS})

format-1-b holds the same, written the same way when log-probs came to be stored byte by byte
(`BYTE_STREAM_SPLIT`), with pyarrow 26.

The third completion has a prompt of its own, as `keep-end` leaves one. All values here are written out by
hand; the keys, the reference's id and the digest of the pairs were worked out with hashlib alone.
"""

from pathlib import Path

import numpy as np
import pytest

from dpo_cache.store import Cache, completion_key, open_cache

GOLDEN = Path(__file__).parent.parent / "golden"

REFERENCE = "6cb51257f390e0b6d101a42c3335e6a9c20774843f9d89f4d1d58c7144401c13"
IDENTITY = {
    "scoring": 1,
    "weights": "5e" * 32,
    "config": {"hidden_size": 32, "model_type": "llama"},
    "dtype": "float32",
}
PROVENANCE = {
    "model": "example/tiny",
    "revision": "main",
    "tokenizer": "example/tiny",
    "device": "cpu",
    "attention": "auto",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}
COMPLETIONS = {
    "941b028d9099c61856e74419dee13fca": ([10, 11, 12], [20, 21]),
    "1bd48066cb852d161195ca2155c3a96f": ([10, 11, 12], [22]),
    "101bef1a9fa8f9ed2558b0339bc8e49f": ([11, 12], [20, 23, 24]),
}
TOKEN_LOGPS = {
    "941b028d9099c61856e74419dee13fca": [-0.5, -0.10000000149011612],
    "1bd48066cb852d161195ca2155c3a96f": [-2.25],
    "101bef1a9fa8f9ed2558b0339bc8e49f": [-1.0, -0.125, -3.5],
}
LOGPS = {
    "941b028d9099c61856e74419dee13fca": -0.6000000014901161,
    "1bd48066cb852d161195ca2155c3a96f": -2.25,
    "101bef1a9fa8f9ed2558b0339bc8e49f": -4.625,
}
PAIRS = [
    (0, "941b028d9099c61856e74419dee13fca", "1bd48066cb852d161195ca2155c3a96f"),
    (2, "941b028d9099c61856e74419dee13fca", "101bef1a9fa8f9ed2558b0339bc8e49f"),
]
DETAILS = {
    "source": {
        "dataset": "example/pairs",
        "format": "text",
        "rows_read": 3,
        "rows_dropped": {"chosen equals rejected": 1},
        "created": "2025-01-01T00:00:00+00:00",
    },
    "tokenization": {
        "tokenizer": "example/tiny",
        "tokenizer_sha256": "70" * 32,
        "chat_template": None,
        "max_length": 5,
        "truncation": "keep-end",
        "max_prompt_length": None,
    },
}


@pytest.fixture(params=["format-1", "format-1-b"])
def cache(request: pytest.FixtureRequest) -> Cache:
    return open_cache(GOLDEN / request.param)


def test_the_reference_of_format_1_is_read(cache: Cache) -> None:
    assert cache.references() == [REFERENCE]
    assert cache.read_reference(REFERENCE) == {"identity": IDENTITY, "provenance": PROVENANCE}


def test_the_scores_of_format_1_are_read(cache: Cache) -> None:
    index = cache.scores(cache.find_reference("6cb5"))
    assert len(index) == 3
    for key, score in zip(COMPLETIONS, index.fetch([bytes.fromhex(key) for key in COMPLETIONS]), strict=True):
        assert score.token_logps.dtype == np.float32
        assert score.token_logps.tolist() == TOKEN_LOGPS[key]
        assert score.logps == LOGPS[key]


def test_the_pairs_of_format_1_are_read(cache: Cache) -> None:
    assert cache.pair_sets() == ["golden/train"]
    found = list(cache.pairs("golden"))
    assert [scored.pair.row for scored in found] == [row for row, _, _ in PAIRS]
    for scored, (_, *keys) in zip(found, PAIRS, strict=True):
        sides = ((scored.pair.chosen, scored.ref_chosen), (scored.pair.rejected, scored.ref_rejected))
        for (completion, score), key in zip(sides, keys, strict=True):
            assert (completion.prompt_ids.tolist(), completion.completion_ids.tolist()) == COMPLETIONS[key]
            assert completion_key(completion).hex() == key
            assert score.token_logps.tolist() == TOKEN_LOGPS[key]
            assert score.logps == LOGPS[key]


def test_the_manifest_of_format_1_is_read(cache: Cache) -> None:
    manifest = dict(cache.pairs("golden").manifest)
    (part,) = manifest.pop("parts")
    file = Path(str(cache)) / "pairs/golden/train" / part["file"]
    assert part == {"file": file.name, "rows": 2, "bytes": file.stat().st_size}
    assert manifest == {
        "format": "dpo-cache pairs",
        "name": "golden",
        "split": "train",
        "reference": REFERENCE,
        "num_pairs": 2,
        "pairs_digest": "b7214029ce9387e9b188125af51ac9633e82760f72a6f24e096330bbdaf124c4",
        **DETAILS,
    }
