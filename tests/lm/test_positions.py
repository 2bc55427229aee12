"""The most tokens of a row, by a model's config."""

import pytest
import torch
import transformers as hf

from dpo_cache.lm.positions import NUMBERED_FROM_PADDING, most_positions
from tests.families.tiny import FAMILIES, make_tiny


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(max_position_embeddings=256), 256),
        (hf.GPT2Config(n_positions=128), 128),
        (hf.WhisperConfig(max_target_positions=448), 448),
        (hf.XLNetConfig(), None),  # has -1
        (hf.BloomConfig(), None),  # has no such field
        (hf.Gemma3Config(text_config={"max_position_embeddings": 512}), 512),
        (hf.OPTConfig(max_position_embeddings=64), 64),  # adds 2 rows to its table
        (hf.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.XLMRobertaXLConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.CamembertConfig(max_position_embeddings=100, pad_token_id=4), 95),
    ],
)
def test_the_limit_is_that_of_the_text(config: hf.PreTrainedConfig, expected: int | None) -> None:
    assert most_positions(config) == expected


NUMBERED = [family for family in FAMILIES if NUMBERED_FROM_PADDING.search(family)]


@pytest.mark.parametrize("family", sorted({*NUMBERED} - {"prophetnet"}))  # which gives the rest one position
def test_a_row_of_the_limit_can_be_run_and_a_longer_one_cannot(family: str) -> None:
    model = make_tiny(family, max_position_embeddings=24, pad_token_id=3)
    assert most_positions(model.config) == 20
    ids = torch.arange(5, 26)[None]
    model(input_ids=ids[:, :20])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_a_row_of_its_limit(family: str) -> None:
    model = make_tiny(family)
    most = most_positions(model.config)
    if most is None or most > 1000:
        return
    with torch.no_grad():
        assert model(input_ids=torch.arange(most)[None] % 200 + 5, use_cache=False).logits.shape[1] == most
