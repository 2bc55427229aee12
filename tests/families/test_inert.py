"""No field of a config that does not count in an identity changes the log-probs of any family."""

import pytest
import torch
import transformers as hf

from dpo_cache.lm.model.config_fields import computing_fields, inert_fields
from tests.families.tiny import FAMILIES, make_tiny
from tests.rotation import is_in_part

# Other values of fields that do not count in most families
OTHER = {
    "pad_token_id": 77,
    "eos_token_id": 88,
    "bos_token_id": 99,
    "sep_token_id": 66,
    "unk_token_id": 55,
    "initializer_range": 0.11,
    "chunk_size_feed_forward": 1,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "pretraining_tp": 2,
    "problem_type": "regression",
}
SPECIAL = (77, 88, 99, 66, 55, 0, 1, 2)  # in a row twice each
MAX_GAP = 1e-4  # nats
ERRORS = (
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    AssertionError,
)
PARAMETERS = [
    pytest.param(family, marks=() if is_in_part(family, FAMILIES) else pytest.mark.slow)
    for family in FAMILIES
]


def row() -> torch.Tensor:
    ids = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    ids[0, torch.arange(0, 48, 3)] = torch.tensor(SPECIAL * 2)
    return ids


def logps(model: hf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=row(), use_cache=False, return_dict=True).logits[0].float().log_softmax(-1)


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", PARAMETERS)
def test_a_field_that_does_not_count_changes_nothing(family: str) -> None:
    hf.utils.logging.set_verbosity_error()
    try:
        model = make_tiny(family)
        expected = logps(model)
    except ERRORS as error:
        pytest.skip(f"no plain forward pass: {error}")  # refused, as test_families shows
    text, counted = model.config.get_text_config(), computing_fields(model.config)
    inert = inert_fields(model.config.model_type) & inert_fields(text.model_type)
    fields = {name: value for name, value in OTHER.items() if name in inert and hasattr(text, name)}

    def gap(changed: dict) -> float | None:
        """In nats; None where such a model cannot be run, or has another id, by a field that it derives."""
        try:
            other = make_tiny(family, **changed)
            other.load_state_dict(model.state_dict())
            found = logps(other)
        except ERRORS:
            return None
        is_same = computing_fields(other.config) == counted
        return float((found - expected).abs().max()) if is_same else None

    whole = gap(fields)
    if whole is None or whole > MAX_GAP:
        gaps = {name: gap({name: value}) for name, value in fields.items()}
        assert {name: found for name, found in gaps.items() if found is not None and found > MAX_GAP} == {}
        assert whole is None
