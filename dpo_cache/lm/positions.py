"""The most tokens that a model was made for; no imports, for commands that load no model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# names in configs, and in those of speech decoders
FIELDS = ("max_position_embeddings", "max_target_positions")

# Families that number the tokens of a row from `pad_token_id` + 1 on, so that the first rows of their table
# of positions are never used; others add such rows to the table, or number from 0.
NUMBERED_FROM_PADDING = re.compile(r"roberta|camembert|data2vec-text|xmod|prophetnet")


def most_positions(config: PreTrainedConfig) -> int | None:
    """The most tokens of a row; None where the config of the text names no limit, or, as XLNet's, -1."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in FIELDS)
    most = next((value for value in found if isinstance(value, int) and value > 0), None)
    if most is None or not NUMBERED_FROM_PADDING.search(text.model_type or ""):
        return most
    padding = getattr(text, "pad_token_id", None)
    return most if padding is None else max(1, most - padding - 1)
