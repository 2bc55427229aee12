"""A short version of the DPO step of TRL 1.16 on one GPU, whose memory is counted next to that of this
package: padded rows and a live reference.

The rows are the chosen, then the rejected sequences of prompt and answer, padded to the longest. The policy
runs them in train mode, under autocast, with its own attention; then the reference runs them without
gradients: a second model, or for adapters the same model with the adapters off. The head computes the logits
of the answers' positions in tiles of 4,096 tokens by 32,768 entries of the vocabulary, forward and backward,
and accumulates gradients in float32.

`whole_logits` is the step of the original repository and of others without such a head: logits in float32
[rows, length, vocabulary], and their log_softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.types import Completion

TILE_TOKENS, TILE_ENTRIES = 4096, 32_768
UNMASKED = "benchmark_sdpa_unmasked"
INSIDE = 64  # rows and entries of a tile at once: kernels need no memory for them, this code needs a little
# With fake tensors, the work of kernels inside a tile is left out: it needs no memory.


def padded_loss(
    completions: Sequence[Completion],
    *,
    autocast: bool,
    reference: Any = None,
    with_adapters: bool = False,
    whole_logits: bool = False,
) -> Callable[[Any], torch.Tensor]:
    """A function from a model to its DPO loss; the completions alternate: chosen, rejected, chosen, ..."""
    rows = [*completions[::2], *completions[1::2]]
    answer_logps = _whole_answer_logps if whole_logits else _answer_logps

    def run(model: Any) -> torch.Tensor:
        policy = answer_logps(model, rows, autocast)
        with torch.no_grad():
            if with_adapters:
                with adapters_off(model):
                    fixed = answer_logps(model, rows, autocast)
            else:
                fixed = answer_logps(reference, rows, autocast)
        chosen, rejected = (policy - fixed).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return run


def prepare(model: Any, *, checkpointing: bool) -> Any:
    """Put the model into the state in which TRL trains it."""
    model.train()
    if checkpointing:
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # the name in newer versions of transformers
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    yield
    for layer in layers:
        layer._disable_adapters = False


def _inputs(model: Any, rows: Sequence[Completion]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The model's inputs, and the positions of the answers' tokens in the flattened rows.

    A mask is given only if there is padding: transformers reads a mask's values to drop one that hides
    nothing, which fails on fake tensors.
    """
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    answers = []
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row.sequence_ids
        answers.append(number * length + np.arange(len(row.prompt_ids), len(row)))
    inputs = {"input_ids": torch.from_numpy(ids)}
    has_padding = any(len(row) < length for row in rows)
    model.set_attn_implementation("sdpa" if has_padding else UNMASKED)
    if has_padding:
        inputs["attention_mask"] = torch.from_numpy(
            (np.arange(length) < np.array([len(row) for row in rows])[:, None]).astype(np.int64)
        )
    return inputs, torch.from_numpy(np.concatenate(answers))


def _answer_logps(model: Any, rows: Sequence[Completion], autocast: bool) -> torch.Tensor:
    """Log-prob of each row's answer [rows], with the tiled head."""
    inputs, answers = _inputs(model, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
        hidden_TD = hidden.flatten(0, 1).index_select(0, answers - 1)
        dtype = torch.bfloat16 if autocast else hidden.dtype
        logps_T = TiledHead.apply(
            hidden_TD, model.get_output_embeddings().weight, inputs["input_ids"].flatten()[answers], dtype
        )
    return _sums(logps_T, rows)


def _whole_answer_logps(model: Any, rows: Sequence[Completion], autocast: bool) -> torch.Tensor:
    """Log-prob of each row's answer [rows], with whole logits; accelerate converts them to float32."""
    inputs, answers = _inputs(model, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**inputs, use_cache=False).logits
    logits = logits.float()[:, :-1].contiguous()  # log_softmax would make this copy internally, uncounted
    logps = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[:, :, 0]
    return _sums(F.pad(logps, (1, 0)).flatten().index_select(0, answers), rows)


def _sums(logps_T: torch.Tensor, rows: Sequence[Completion]) -> torch.Tensor:
    owners = torch.from_numpy(np.repeat(np.arange(len(rows)), [row.num_tokens for row in rows]))
    return logps_T.new_zeros(len(rows)).index_add(0, owners, logps_T)


AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)


class TiledHead(torch.autograd.Function):
    """Log-probs [T] of targets from hidden states [T, D] and the head's weight [V, D]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        normalizers = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
        picked = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for tokens, entries, tile, _, _ in _tiles(hidden, weight, dtype):
            for part in _parts(tile):
                here = slice(tokens + part, min(tokens + part + INSIDE, tokens + len(tile)))
                block = tile[part : part + INSIDE].float()
                normalizers[here] = torch.logaddexp(normalizers[here], block.logsumexp(-1))
                inside, places = _inside(targets[here], entries, tile.shape[1])
                picked[here] += torch.where(inside, block.gather(1, places)[:, 0], 0)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.dtype = dtype
        return picked - normalizers

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for tokens, entries, tile, hidden_part, weight_part in _tiles(hidden, weight, ctx.dtype):
            for part in _parts(tile):
                here = slice(tokens + part, min(tokens + part + INSIDE, tokens + len(tile)))
                block = (
                    (tile[part : part + INSIDE].float() - normalizers[here, None])
                    .exp_()
                    .mul_(-grads[0][here, None])
                )
                inside, places = _inside(targets[here], entries, tile.shape[1])
                tile[part : part + INSIDE] = block.scatter_add_(
                    1, places, torch.where(inside, grads[0][here], 0)[:, None]
                )
            for first in _parts(tile.t(), INSIDE * 16):
                columns = slice(first, first + INSIDE * 16)
                if grad_hidden is not None:
                    grad_hidden[tokens : tokens + len(tile)].addmm_(
                        tile[:, columns].float(), weight_part[columns].float()
                    )
                if grad_weight is not None:
                    grad_weight[entries : entries + tile.shape[1]][columns].addmm_(
                        tile[:, columns].t().float(), hidden_part.float()
                    )
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """First token, first entry, logits, hidden states and weights of each tile, all tiles in one buffer."""
    buffer = hidden.new_empty(min(len(hidden), TILE_TOKENS), TILE_ENTRIES, dtype=dtype)
    for tokens in range(0, len(hidden), TILE_TOKENS):
        hidden_part = hidden[tokens : tokens + TILE_TOKENS].to(dtype)
        for entries in range(0, len(weight), TILE_ENTRIES):
            weight_part = weight[entries : entries + TILE_ENTRIES].to(dtype)
            tile = buffer[: len(hidden_part), : len(weight_part)]
            torch.mm(hidden_part, weight_part.t(), out=tile)
            yield tokens, entries, tile, hidden_part, weight_part


def _parts(tile: torch.Tensor, step: int = INSIDE) -> range:
    return range(0, 0 if isinstance(tile, FakeTensor) else len(tile), step)


def _inside(targets: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (targets >= first) & (targets < first + width), (targets - first).clamp(0, width - 1)[:, None]
