import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_cache.errors import OptionError
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.store import PairSet, open_cache
from dpo_cache.store import pairs as pairs_module
from dpo_cache.training import batches
from dpo_cache.training.batches import completions_of, held_out, split_step, stream_pairs, training_batches
from dpo_cache.training.optim.schedule import learning_rate
from dpo_cache.types import Completion, Pair, Score, ScoredPair


def make_pairs(num_pairs: int, seed: int = 0) -> list[ScoredPair]:
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 50, int(generator.integers(low, high))).astype(np.uint32)

    prompts = [ids(2, 9) for _ in range(max(1, num_pairs // 3))]
    pairs = []
    for row in range(num_pairs):
        prompt = prompts[row % len(prompts)]
        sides = Completion(prompt, ids(1, 9)), Completion(prompt, ids(1, 9))
        pairs.append(
            ScoredPair(
                Pair(row, *sides),
                *(Score(-generator.random(side.num_tokens, np.float32)) for side in sides),
            )
        )
    return pairs


@pytest.fixture
def pair_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairSet:
    monkeypatch.setattr(pairs_module, "ROW_GROUP_PAIRS", 5)
    monkeypatch.setattr(pairs_module, "PART_PAIRS", 15)
    monkeypatch.setattr(batches, "SHUFFLE_BLOCKS", 3)
    cache = open_cache(tmp_path, create=True)
    writer = cache.write_pairs("p", "train")
    writer.add(make_pairs(47))
    writer.finish({"name": "p", "split": "train", "reference": "0" * 64})
    return cache.pairs("p")


def rows(pair_set: PairSet, selected: np.ndarray | None = None, **options: object) -> list[int]:
    chosen = np.ones(47, bool) if selected is None else selected
    return [
        scored.pair.row
        for scored in stream_pairs(pair_set, chosen, **{"shuffle": True, "seed": 0, "epoch": 0, **options})
    ]


def test_an_epoch_has_every_pair_once(pair_set: PairSet) -> None:
    assert sorted(rows(pair_set)) == list(range(47))
    assert rows(pair_set, shuffle=False) == list(range(47))


def test_order_depends_only_on_seed_and_epoch(pair_set: PairSet) -> None:
    np.random.seed(5)
    first = rows(pair_set)
    np.random.seed(6)
    assert rows(pair_set) == first
    assert rows(pair_set, seed=1) != first
    assert rows(pair_set, epoch=1) != first
    assert first != sorted(first)


@pytest.mark.parametrize("skip", [0, 1, 14, 15, 16, 31, 46, 47])
@pytest.mark.parametrize("shuffle", [True, False])
def test_skipping_is_the_same_as_reading_and_throwing_away(
    pair_set: PairSet, skip: int, shuffle: bool
) -> None:
    assert rows(pair_set, shuffle=shuffle, skip=skip) == rows(pair_set, shuffle=shuffle)[skip:]


def test_only_selected_pairs_are_read(pair_set: PairSet) -> None:
    selected = np.arange(47) % 4 == 1
    assert sorted(rows(pair_set, selected)) == np.flatnonzero(selected).tolist()


def test_pairs_of_one_prompt_are_held_out_together(pair_set: PairSet) -> None:
    held = held_out(pair_set, 0.4, seed=3)
    by_prompt: dict[bytes, set[bool]] = {}
    for scored, is_held in zip(pair_set, held, strict=True):
        by_prompt.setdefault(scored.pair.chosen.prompt_ids.tobytes(), set()).add(bool(is_held))
    assert all(len(sides) == 1 for sides in by_prompt.values())
    assert 0 < held.sum() < 47
    assert (held_out(pair_set, 0.4, seed=4) != held).any()


@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_a_step_is_split_within_its_budget_and_whole(budget: int) -> None:
    pairs = make_pairs(20)
    groups = split_step(pairs, budget)
    assert sorted(scored.pair.row for group in groups for scored in group.pairs) == list(range(20))
    assert all(len(group.pairs) == 1 or group.num_tokens <= budget for group in groups)
    assert all(group.num_tokens == count_forest_tokens(completions_of(group.pairs)) for group in groups)
    assert len(groups) == {1: 20, 10_000: 1}.get(budget, len(groups))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
def test_rates_are_those_of_transformers(schedule: str, warmup_ratio: float) -> None:
    import math

    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=min(math.ceil(17 * warmup_ratio), 16), num_training_steps=17
    )
    for step in range(17):
        found = learning_rate(step, 17, peak=2e-5, schedule=schedule, warmup_ratio=warmup_ratio)
        assert found == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("steps", [0, 3, 16, 40])
def test_a_warm_up_may_be_given_in_steps(steps: int) -> None:
    given = {"peak": 2e-5, "schedule": "linear", "warmup_ratio": 0.1, "warmup_steps": steps}
    rates = [learning_rate(step, 17, **given) for step in range(17)]
    expected = min(steps, 16)
    assert rates[expected] == max(rates) == 2e-5
    assert rates[:expected] == [pytest.approx(2e-5 * step / expected) for step in range(expected)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 5, 50])
def test_a_warm_up_never_takes_all_steps(total_steps: int, warmup_ratio: float, schedule: str) -> None:
    rates = [
        learning_rate(step, total_steps, peak=1e-5, schedule=schedule, warmup_ratio=warmup_ratio)
        for step in range(total_steps)
    ]
    assert max(rates) == 1e-5


def test_batches_have_the_order_of_training_and_may_begin_anywhere(pair_set: PairSet) -> None:
    for epoch in range(2):
        found = [batch.rows.tolist() for batch in training_batches(pair_set, 6, seed=3, epoch=epoch)]
        assert [len(batch) for batch in found] == [6] * 7 + [5]
        assert [row for batch in found for row in batch] == rows(pair_set, seed=3, epoch=epoch)
        later = [batch.rows.tolist() for batch in training_batches(pair_set, 6, seed=3, epoch=epoch, skip=12)]
        assert later == found[2:]
    assert [len(batch) for batch in training_batches(pair_set, 6, drop_last=True)] == [6] * 7
    in_order = training_batches(pair_set, 47, shuffle=False)
    assert next(in_order).rows.tolist() == list(range(47))


def test_a_batch_is_the_pairs_padded_on_the_right(pair_set: PairSet) -> None:
    for batch in training_batches(pair_set, 6, pad_id=7):
        pairs = [pair_set[row] for row in batch.rows.tolist()]
        completions = completions_of(pairs)
        longest = max(map(len, completions))
        assert batch.input_ids.shape == batch.attention_mask.shape == (len(completions), longest)
        assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
        assert batch.completion_mask.dtype == torch.bool and batch.ref_chosen_logps.dtype == torch.float32
        for row, completion in enumerate(completions):
            length, prompt = len(completion), len(completion.prompt_ids)
            assert batch.input_ids[row].tolist() == completion.sequence_ids.tolist() + [7] * (
                longest - length
            )
            assert batch.attention_mask[row].tolist() == [1] * length + [0] * (longest - length)
            assert batch.completion_mask[row].nonzero().flatten().tolist() == list(range(prompt, length))
        assert batch.ref_chosen_logps.tolist() == [np.float32(scored.ref_chosen.logps) for scored in pairs]
        assert batch.ref_rejected_logps.tolist() == [
            np.float32(scored.ref_rejected.logps) for scored in pairs
        ]
        assert batch.to("meta").input_ids.device.type == "meta" and len(batch) == len(pairs)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        *(("batch_size", value, 1) for value in (0, -1, 2.5, "8", True, None)),
        *((name, value, 0) for name in ("seed", "epoch", "skip") for value in (-1, 0.5, "1", False)),
    ],
)
def test_batches_of_numbers_that_make_no_sense_are_refused(
    pair_set: PairSet, name: str, value: object, least: int
) -> None:
    expected = re.escape(f"`{name}` {value!r}: expected a whole number of {least} or more.")
    with pytest.raises(OptionError, match=f"^{expected}$"):
        training_batches(pair_set, **{name: value})


def test_batches_take_numbers_of_numpy(pair_set: PairSet) -> None:
    given = {"batch_size": 6, "seed": 3, "epoch": 1, "skip": 12}
    expected = [batch.rows.tolist() for batch in training_batches(pair_set, **given)]
    numbers = {name: np.int64(value) for name, value in given.items()}
    assert [batch.rows.tolist() for batch in training_batches(pair_set, **numbers)] == expected
