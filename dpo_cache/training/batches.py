"""Batches of a pair set: the order of an epoch, tensors for a user's own loop, and the groups of a step."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import compress, islice

import numpy as np
import torch

from dpo_cache.errors import OptionError
from dpo_cache.lm.forest.layout import count_forest_tokens, group_by_tokens
from dpo_cache.store import PairSet
from dpo_cache.suggestions import checks_keywords
from dpo_cache.types import Completion, ScoredPair

CountTokens = Callable[[Sequence[Completion]], int]

SHUFFLE_BLOCKS = 32  # blocks of 256 pairs that are shuffled together: 8,192 pairs in memory


@dataclass(frozen=True)
class TrainingBatch:
    """P pairs as tensors: rows 0 to P-1 are prompts with their chosen answers, rows P to 2P-1 the same
    prompts with their rejected answers. Rows are padded on the right to L, the longest of the batch.
    """

    input_ids: torch.Tensor  # int64 [2P, L]
    attention_mask: torch.Tensor  # int64 [2P, L]: 1 at tokens, 0 at padding
    completion_mask: torch.Tensor  # bool [2P, L]: True at tokens of the answer
    ref_chosen_logps: torch.Tensor  # float32 [P]: sums over the answer's tokens, in nats
    ref_rejected_logps: torch.Tensor  # float32 [P]
    rows: torch.Tensor  # int64 [P]: row of each pair in the data set

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<TrainingBatch: {len(self)} pairs, rows padded to {self.input_ids.shape[1]} tokens>"

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on a device."""
        return TrainingBatch(**{entry.name: getattr(self, entry.name).to(device) for entry in fields(self)})


@checks_keywords
def training_batches(
    pair_set: PairSet,
    batch_size: int = 32,
    *,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    drop_last: bool = False,
    pad_id: int = 0,
) -> Iterator[TrainingBatch]:
    """One epoch of a pair set as batches with the reference's log-probs, for a loop of your own.

    The order is that of `train` with the same `seed` and `epoch`; without `shuffle` it is the data set's.
    `skip` leaves out the first pairs of the epoch, which resumes a loop without reading them. The last batch
    may be smaller, unless `drop_last`. `pad_id` fills positions that the masks hide.

        for batch in training_batches(pair_set, 8):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    Raises `OptionError`.
    """
    least = {"batch_size": (batch_size, 1), "seed": (seed, 0), "epoch": (epoch, 0), "skip": (skip, 0)}
    for name, (value, smallest) in least.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < smallest:
            raise OptionError(f"`{name}` {value!r}: expected a whole number of {smallest} or more.")
    every = np.ones(len(pair_set), bool)
    stream = stream_pairs(pair_set, every, shuffle=shuffle, seed=seed, epoch=epoch, skip=skip)
    batches = iter(lambda: list(islice(stream, batch_size)), [])
    return (_tensors(pairs, pad_id) for pairs in batches if len(pairs) == batch_size or not drop_last)


def _tensors(pairs: Sequence[ScoredPair], pad_id: int) -> TrainingBatch:
    completions = completions_of(pairs)
    shape = len(completions), max(map(len, completions))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    for row, completion in enumerate(completions):
        input_ids[row, : len(completion)] = torch.from_numpy(completion.sequence_ids.astype(np.int64))
        attention_mask[row, : len(completion)] = 1
        completion_mask[row, len(completion.prompt_ids) : len(completion)] = True
    return TrainingBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        ref_chosen_logps=torch.tensor([scored.ref_chosen.logps for scored in pairs], dtype=torch.float32),
        ref_rejected_logps=torch.tensor([scored.ref_rejected.logps for scored in pairs], dtype=torch.float32),
        rows=torch.tensor([scored.pair.row for scored in pairs], dtype=torch.int64),
    )


def stream_pairs(
    pair_set: PairSet, selected: np.ndarray, *, shuffle: bool, seed: int, epoch: int, skip: int = 0
) -> Iterator[ScoredPair]:
    """Yield the selected pairs in the order of one epoch, without the first `skip`, which are not even read.

    The order depends only on `seed`, `epoch`, the pair set and the selection. Shuffling permutes the
    blocks of the pair set and then the pairs within each 32 of them: up to 8,192 pairs that is a uniform
    shuffle, and for more pairs memory stays flat.

    `selected` is bool, with one entry for each pair of the set, in its order.
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
    """Mask of the pairs that are held out for evaluation: bool, one entry for each pair.

    A hash of the prompt and the seed decides, so all pairs of one prompt are on the same side, and remain
    there when rows are added or reordered.
    """
    return np.array([_lot(prompt_ids, seed) < fraction for prompt_ids in pair_set.read_prompts()], bool)


def longest_pairs(pair_set: PairSet, selected: np.ndarray, number: int) -> list[ScoredPair]:
    """The selected pairs with the most tokens, longest first: the largest step that must fit into memory."""
    return heapq.nlargest(
        number,
        compress(pair_set, selected),
        key=lambda scored: len(scored.pair.chosen) + len(scored.pair.rejected),
    )


def count_shared(pair_set: PairSet, other: PairSet, *, fraction: float = 0.0, seed: int = 0) -> int:
    """The number of pairs of the second set whose prompts are also in the first, with any answers. Prompts
    that `held_out` holds out of the first set do not count.
    """
    wanted = Counter(
        prompt_ids.tobytes() for prompt_ids in other.read_prompts() if _lot(prompt_ids, seed) >= fraction
    )
    found = {prompt for prompt_ids in pair_set.read_prompts() if (prompt := prompt_ids.tobytes()) in wanted}
    return sum(count for prompt, count in wanted.items() if prompt in found)


@dataclass
class Group:
    """Pairs of a step that are run at once, and the number of tokens that this takes."""

    pairs: list[ScoredPair]
    num_tokens: int


def split_step(
    pairs: Sequence[ScoredPair], budget_tokens: int, count_tokens: CountTokens = count_forest_tokens
) -> list[Group]:
    """The pairs of a step in groups of at most `budget_tokens` tokens, counted by `count_tokens`; a pair
    is never split.

    Pairs with similar prompts are in one group, so that a shared prefix is run once. A pair that is longer
    than the budget is a group by itself.
    """
    groups = group_by_tokens(
        sort_pairs(pairs), budget_tokens, lambda pairs: count_tokens(completions_of(pairs))
    )
    return [Group(found, num_tokens) for found, num_tokens in groups]


def sort_pairs(pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    """The pairs such that those with similar prompts are neighbours."""
    return sorted(pairs, key=lambda scored: scored.pair.chosen.sequence_ids.astype(">u4").tobytes())


def completions_of(pairs: Sequence[ScoredPair]) -> list[Completion]:
    """All chosen completions, then all rejected ones."""
    return [scored.pair.chosen for scored in pairs] + [scored.pair.rejected for scored in pairs]


def _lot(prompt_ids: np.ndarray, seed: int) -> float:
    digest = hashlib.blake2b(
        prompt_ids.astype("<u4").tobytes(), digest_size=8, key=str(seed).encode()
    ).digest()
    return int.from_bytes(digest, "little") / 2**64
