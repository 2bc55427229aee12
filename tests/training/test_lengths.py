"""The longest row over all pair sets of a run, which the self-check must know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import transformers as hf

from dpo_cache.training import inputs, lengths
from dpo_cache.training.lengths import measure_rows
from dpo_cache.types import Completion, Pair, Score, ScoredPair


@dataclass
class Pairs:
    """A pair set of rows of these lengths, which counts how many are read."""

    lengths: list[int]
    max_length: int
    read: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manifest = {"tokenization": {"max_length": self.max_length}}

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for number, length in enumerate(self.lengths):
            self.read += 1
            ids = np.arange(length, dtype=np.uint32)
            sides = Completion(ids[:3], ids[3:]), Completion(ids[:3], ids[3:5])
            yield ScoredPair(Pair(number, *sides), Score(np.zeros(length - 3)), Score(np.zeros(2)))


def measure(*pair_sets: Pairs, config: hf.PreTrainedConfig | None = None) -> lengths.RowLengths:
    return measure_rows(pair_sets, config or hf.LlamaConfig())  # type: ignore[arg-type]


def test_the_longest_row_is_that_of_all_sets() -> None:
    rows = measure(Pairs([8, 20], 1024), Pairs([9, 70], 1024))
    assert rows.longest == 70 and rows.pair_tokens == np.mean([10, 22, 11, 72])


def test_a_large_set_is_read_to_its_end_only_if_a_length_of_the_config_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lengths, "SCANNED_PAIRS", 3)
    pairs = Pairs([8, 20, 9, 50, 8, 8], 64)
    assert measure(pairs).longest == 64 and pairs.read == 3
    pairs = Pairs([8, 20, 9, 50, 8, 8], 64)
    assert measure(pairs, config=hf.MistralConfig(sliding_window=40)).longest == 50
    assert measure(pairs, config=hf.MistralConfig(sliding_window=15)).longest == 64
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = hf.LlamaConfig(max_position_embeddings=60, rope_parameters=dynamic)
    assert measure(Pairs([8, 20, 9, 50, 8, 8], 64), config=config).longest == 50


def test_training_chooses_the_attention_for_the_longest_row_of_both_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(inputs, "choose_attention", lambda model, **options: found.update(options))
    data = inputs.TrainingPairs(
        Pairs([8, 20], 24),
        np.ones(2, bool),
        Pairs([9, 70], 1024),
        np.ones(2, bool),
        {},  # type: ignore[arg-type]
    )
    options = inputs.TrainOptions(cache="cache", output="output", epochs=3, budget_tokens="50")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ))  # fmt: skip
    rows = measure_rows(data.pair_sets, model.config)
    inputs._choose_attention(options, data, model, rows, may_retry=True)
    assert found == {
        "max_length": 70, "chunk_tokens": 70, "run_tokens": int(3 * 2 * np.mean([10, 22, 11, 72])), "ways": ("forest",),
        "may_retry": True,
    }  # fmt: skip
