"""In which order pairs are trained on, and how a step is split to fit in memory."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.store import PairSet
from dpo_cache.types import Completion, ScoredPair

CountTokens = Callable[[Sequence[Completion]], int]

SHUFFLE_BLOCKS = 32  # blocks of 256 pairs that are shuffled among each other: 8,192 pairs in memory


def stream_pairs(
    pair_set: PairSet, selected: np.ndarray, *, shuffle: bool, seed: int, epoch: int, skip: int = 0
) -> Iterator[ScoredPair]:
    """The selected pairs in the order of one epoch, without the first `skip`, which are not even read.

    The order depends on `seed`, `epoch`, the pair set and the selection alone. Shuffling permutes the
    blocks of the pair set and then the pairs within each 32 of them: up to 8,192 pairs that is a uniform
    shuffle, beyond it memory stays flat.

    `selected` is bool, one entry a pair of the set, in its own order.
    """
    sizes = np.array(pair_set.block_sizes)
    firsts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng([seed, epoch])
    blocks = generator.permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    width = SHUFFLE_BLOCKS if shuffle else 1
    for start in range(0, len(blocks), width):
        window = blocks[start : start + width]
        places = [
            (block, row) for block in window for row in range(sizes[block]) if selected[firsts[block] + row]
        ]
        if shuffle:
            places = [places[index] for index in generator.permutation(len(places))]
        if skip >= len(places):
            skip -= len(places)
            continue
        loaded = {block: pair_set.read_block(block) for block in {block for block, _ in places[skip:]}}
        for block, row in places[skip:]:
            yield loaded[block][row]
        skip = 0


def held_out(pair_set: PairSet, fraction: float, seed: int) -> np.ndarray:
    """Which pairs are held out for evaluation: bool, one entry a pair.

    Decided by a hash of the prompt and the seed, so all pairs of one prompt fall on one side, and stay there
    when rows are added or reordered.
    """
    return np.array([_lot(scored.pair.chosen.prompt_ids, seed) < fraction for scored in pair_set], bool)


def longest_pairs(pair_set: PairSet, selected: np.ndarray, number: int) -> list[ScoredPair]:
    """The selected pairs with the most tokens, longest first: what a step may have to fit into memory."""
    found: list[tuple[int, int, ScoredPair]] = []
    for place, scored in enumerate(pair_set):
        if selected[place]:
            entry = (len(scored.pair.chosen) + len(scored.pair.rejected), -place, scored)
            (heapq.heappush if len(found) < number else heapq.heappushpop)(found, entry)
    return [scored for _, _, scored in sorted(found, reverse=True)]


def count_shared(pair_set: PairSet, other: PairSet) -> int:
    """How many pairs of the second set stand in the first, token for token."""
    wanted = Counter(other.read_keys())
    found = {keys for keys in pair_set.read_keys() if keys in wanted}
    return sum(count for keys, count in wanted.items() if keys in found)


@dataclass
class Group:
    """Pairs of a step that are run at once, and the tokens that takes."""

    pairs: list[ScoredPair]
    num_tokens: int


def split_step(
    pairs: Sequence[ScoredPair], budget_tokens: int, count_tokens: CountTokens = count_forest_tokens
) -> list[Group]:
    """The pairs of a step in groups of at most `budget_tokens` tokens, as `count_tokens` counts them; a pair
    is never split.

    Pairs with similar prompts stand together, so that what they share is run once. A pair that is longer
    than the budget makes a group of its own.
    """
    groups: list[Group] = []
    for pair in sorted(pairs, key=lambda scored: scored.pair.chosen.sequence_ids.astype(">u4").tobytes()):
        if groups:
            together = [*groups[-1].pairs, pair]
            num_tokens = count_tokens(completions_of(together))
            if num_tokens <= budget_tokens:
                groups[-1] = Group(together, num_tokens)
                continue
        groups.append(Group([pair], count_tokens(completions_of([pair]))))
    return groups


def completions_of(pairs: Sequence[ScoredPair]) -> list[Completion]:
    """All chosen completions, then all rejected ones."""
    return [scored.pair.chosen for scored in pairs] + [scored.pair.rejected for scored in pairs]


def _lot(prompt_ids: np.ndarray, seed: int) -> float:
    digest = hashlib.blake2b(
        prompt_ids.astype("<u4").tobytes(), digest_size=8, key=str(seed).encode()
    ).digest()
    return int.from_bytes(digest, "little") / 2**64
