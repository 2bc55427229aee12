"""Scores, pairs and damaged bytes, made in-process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cache.store.folders.folder import LocalFolder
from dpo_cache.types import Completion, Pair, Score, ScoredPair
from tests.store.object_store import s3, s3_server  # noqa: F401 (fixtures)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


def score(*token_logps: float) -> Score:
    return Score(np.array(token_logps, np.float32))


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def make_scores(numbers: Sequence[int]) -> list[tuple[bytes, Score]]:
    """Scores of 1 to 5 tokens that depend only on their numbers."""
    return [
        (key(number), Score(-np.random.default_rng(number).random(1 + number % 5, np.float32)))
        for number in numbers
    ]


def make_pairs(count: int, first_row: int = 0) -> list[ScoredPair]:
    """Scored pairs; every third has a rejected prompt of its own."""
    generator = np.random.default_rng(first_row)

    def tokens() -> np.ndarray:
        return generator.integers(0, 2**32, int(generator.integers(1, 6))).astype(np.uint32)

    def scored(completion: Completion) -> Score:
        return Score(-generator.random(completion.num_tokens, np.float32))

    pairs = []
    for row in range(first_row, first_row + count):
        prompt = tokens()
        chosen, rejected = (
            Completion(prompt, tokens()),
            Completion(tokens() if row % 3 == 0 else prompt, tokens()),
        )
        pairs.append(ScoredPair(Pair(row, chosen, rejected), scored(chosen), scored(rejected)))
    return pairs


def plain(scored: ScoredPair) -> dict[str, Any]:
    """All of a scored pair as numbers that can be compared."""
    return {
        "row": scored.pair.row,
        "prompts": (scored.pair.chosen.prompt_ids.tolist(), scored.pair.rejected.prompt_ids.tolist()),
        "completions": (
            scored.pair.chosen.completion_ids.tolist(),
            scored.pair.rejected.completion_ids.tolist(),
        ),
        "token_logps": (scored.ref_chosen.token_logps.tolist(), scored.ref_rejected.token_logps.tolist()),
        "logps": (scored.ref_chosen.logps, scored.ref_rejected.logps),
        "dtypes": {
            str(array.dtype) for array in (scored.pair.chosen.sequence_ids, scored.pair.rejected.sequence_ids)
        },
    }


def flip(content: bytes, position: int, mask: int = 0x01) -> bytes:
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def flip_file(path: Path, position: int, mask: int = 0x01) -> None:
    path.write_bytes(flip(path.read_bytes(), position, mask))


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "cache")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users can reach, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
