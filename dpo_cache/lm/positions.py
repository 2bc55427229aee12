"""The most tokens that a model was made for; no imports, for commands that load no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# of configs, and of those of decoders of speech
FIELDS = ("max_position_embeddings", "max_target_positions")


def most_positions(config: PreTrainedConfig) -> int | None:
    """The most tokens of a row; None where the config of the text names no limit, or, as XLNet's, -1."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in FIELDS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
