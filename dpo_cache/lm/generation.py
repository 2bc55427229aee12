"""Answers that a model writes: drawn from its own probabilities, nothing added and nothing cut off.

`model.generate` knows no forest plan, so a model that was switched to forest attention gets its own back
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.forest.attention import FOREST_ATTENTION, use_forest_attention
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import TokenIds

MOST_AT_ONCE = 16  # answers: on a CPU running out of memory ends the process, so it is not found by trying


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model wrote under a prompt."""

    token_ids: TokenIds  # uint32 [num_tokens], its end token among them
    is_finished: bool  # by an end token; otherwise cut at the length


@torch.no_grad()
def write_answers(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    attention: AttentionChoice,
    *,
    max_length: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: Sequence[int],
) -> list[Answer]:
    """One answer a prompt, until an end token or `max_length` tokens of prompt and answer.

    Each token is drawn from `softmax(logits)`, whatever generation config the model brings. The same model,
    prompts and seed give the same answers on the same machine, and no other random state moves. Where memory
    runs out, fewer are written at once, which draws other answers; raises what the device raised where one
    alone does not fit.

    Every prompt is shorter than `max_length`.
    """
    assert all(0 < len(prompt) < max_length for prompt in prompts)
    answers: list[Answer] = []
    at_once = min(MOST_AT_ONCE, attention.max_rows or MOST_AT_ONCE)
    with original_attention(model, attention), _plain_generation(model):
        while len(answers) < len(prompts):
            batch = prompts[len(answers) : len(answers) + at_once]
            try:
                with _random_state(model.device, [*seed, len(answers)]):
                    answers += _write_batch(model, batch, max_length, end_ids, pad_id)
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error, model.device):
                    raise
                at_once = len(batch) // 2
            if model.device.type == "cuda":
                torch.cuda.empty_cache()  # what keys and values took, in odd sizes, is of no use to training
    return answers


@contextmanager
def original_attention(model: PreTrainedModel, attention: AttentionChoice) -> Iterator[None]:
    """The model with the attention that it came with, for calls without a forest plan."""
    if model.config._attn_implementation != FOREST_ATTENTION:
        yield
        return
    assert attention.original is not None
    model.set_attn_implementation(attention.original)
    try:
        yield
    finally:
        use_forest_attention(model)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """No repetition penalties, suppressed tokens or the like that the model's own config asks for."""
    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


@contextmanager
def _random_state(device: torch.device, seed: Sequence[int]) -> Iterator[None]:
    """Random numbers that depend on the seed alone, and afterwards those that would have come without
    them.
    """
    number = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng(
        devices=[] if device.type == "cpu" else [device],
        device_type="cuda" if device.type == "cpu" else device.type,
    ):
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)  # `torch.manual_seed` would seed every GPU of the machine
        elif device.type == "mps":
            torch.mps.manual_seed(number)
        yield


def _write_batch(
    model: PreTrainedModel, prompts: Sequence[TokenIds], max_length: int, end_ids: Sequence[int], pad_id: int
) -> list[Answer]:
    """Answers written side by side. As long as the longest has room; what is not finished then is taken up
    again without it.
    """
    written = [np.empty(0, np.uint32) for _ in prompts]
    finished = [False] * len(prompts)
    unfinished = list(range(len(prompts)))
    while unfinished:
        sequences = [np.concatenate([prompts[place], written[place]]) for place in unfinished]
        added = _generate(model, sequences, max_length - max(map(len, sequences)), end_ids, pad_id)
        for place, tokens in zip(unfinished, added, strict=True):
            ends = np.flatnonzero(np.isin(tokens, end_ids))
            finished[place] = bool(len(ends))
            written[place] = np.concatenate([written[place], tokens[: ends[0] + 1] if len(ends) else tokens])
        unfinished = [
            place
            for place in unfinished
            if not finished[place] and len(prompts[place]) + len(written[place]) < max_length
        ]
    return [Answer(tokens, is_finished) for tokens, is_finished in zip(written, finished, strict=True)]


def _generate(
    model: PreTrainedModel,
    sequences: Sequence[TokenIds],
    num_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
) -> np.ndarray:
    """What follows each sequence: uint32 [B, at most num_tokens]; behind an end token stand others."""
    width = max(map(len, sequences))
    ids, mask = (
        np.full((len(sequences), width), pad_id, np.int64),
        np.zeros((len(sequences), width), np.int64),
    )
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :], mask[row, width - len(sequence) :] = sequence, 1
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_tokens,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    inputs = {
        "input_ids": torch.from_numpy(ids).to(model.device),
        "attention_mask": torch.from_numpy(mask).to(model.device),
    }
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    output = generate(**inputs, generation_config=config)
    return output[:, width:].cpu().numpy().astype(np.uint32)
