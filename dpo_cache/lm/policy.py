"""Log-probs of completions with gradients: what the training loop asks of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.attention import plan_tree
from dpo_cache.lm.device import sum_dtype
from dpo_cache.lm.engine import Attention
from dpo_cache.lm.forest import build_forest, count_forest_tokens
from dpo_cache.lm.logprobs import decoder_of, head_of, head_token_logps, token_logps
from dpo_cache.lm.scoring import row_logps
from dpo_cache.types import Completion


def completion_logps(model: PreTrainedModel, completions: Sequence[Completion], attention: Attention) -> torch.Tensor:
    """Summed log-prob of each completion in nats, [len(completions)], float64 (float32 on MPS).

    Equals the sum over each completion's tokens of `log_softmax(logits.float(), -1)`, but prefixes that
    completions share are run once, in one flat row without padding.
    """
    if attention.name == "rows":
        size = attention.max_rows or len(completions)
        batches = [completions[start : start + size] for start in range(0, len(completions), size)]
        logps = [row for batch in batches for row in row_logps(model, batch)]
        return torch.stack([row.to(sum_dtype(row.device)).sum() for row in logps])
    forest = build_forest(completions)
    device = model.device
    hidden_LD = decoder_of(model)(
        input_ids=torch.from_numpy(forest.tokens_L).to(device)[None],
        position_ids=torch.from_numpy(forest.depths_L).to(device)[None],
        use_cache=False,
        forest_plan=plan_tree(forest),
    )[0][0]
    targets = np.flatnonzero(forest.is_target_L())
    parents = torch.from_numpy(forest.parents_L[targets]).to(device)
    logps_T = _target_logps(model, hidden_LD.index_select(0, parents), torch.from_numpy(forest.tokens_L[targets]).to(device), attention)
    owners = np.repeat(np.arange(len(completions)), [len(target) for target in forest.targets])
    places = np.searchsorted(targets, np.concatenate(forest.targets))
    shares = logps_T[torch.from_numpy(places).to(device)].to(sum_dtype(device))
    return shares.new_zeros(len(completions)).index_add(0, torch.from_numpy(owners).to(device), shares)


def _target_logps(model: PreTrainedModel, hidden_TD: torch.Tensor, targets_T: torch.Tensor, attention: Attention) -> torch.Tensor:
    if attention.has_plain_head and torch.is_grad_enabled():
        return head_token_logps(hidden_TD, model.get_output_embeddings(), targets_T)
    return token_logps(hidden_TD, head_of(model), targets_T, model.config.get_text_config().vocab_size)


def count_tokens(completions: Sequence[Completion], attention: Attention) -> int:
    """Tokens that `completion_logps` runs through the model: of the forest, or of the rows with their padding."""
    if attention.name == "forest":
        return count_forest_tokens(completions)
    lengths = [len(completion.sequence_ids) for completion in completions]
    return sum(lengths) if attention.max_rows == 1 else max(lengths) * len(lengths)


def default_micro_tokens(device: torch.device) -> int:
    """Tokens run at once with gradients: enough for matrix products at full speed; their activations are what memory holds."""
    return 1024 if device.type == "cpu" else 4096
