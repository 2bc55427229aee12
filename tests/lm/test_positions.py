"""The most tokens of a row, by a model's config."""

import pytest
import transformers as hf

from dpo_cache.lm.positions import most_positions


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(max_position_embeddings=256), 256),
        (hf.GPT2Config(n_positions=128), 128),
        (hf.WhisperConfig(max_target_positions=448), 448),
        (hf.XLNetConfig(), None),  # has -1
        (hf.BloomConfig(), None),  # has no such field
        (hf.Gemma3Config(text_config={"max_position_embeddings": 512}), 512),
    ],
)
def test_the_limit_is_that_of_the_text(config: hf.PreTrainedConfig, expected: int | None) -> None:
    assert most_positions(config) == expected
