"""Answers that a model generates: each token is drawn from the model's own probabilities.

`model.generate` passes no forest plan, so a model that was switched to forest attention gets its original
attention for the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.forest.attention import FOREST_ATTENTION, set_attention, use_forest_attention
from dpo_cache.lm.positions import most_positions
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import TokenIds

MOST_AT_ONCE = 16  # answers: on a CPU, running out of memory ends the process, so no larger batch is tried


@dataclass(frozen=True, eq=False)
class Answer:
    """The model's answer to a prompt."""

    token_ids: TokenIds  # uint32 [num_tokens], with its end token
    is_finished: bool  # by an end token; otherwise cut at the length


@torch.no_grad()
def write_answers(
    policy: torch.nn.Module,
    prompts: Sequence[TokenIds],
    *,
    model: PreTrainedModel,
    attention: AttentionChoice,
    max_length: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: Sequence[int],
) -> list[Answer]:
    """One answer to each prompt, until an end token or `max_length` tokens of prompt and answer.

    Each token is drawn from `softmax(logits)`, whatever the model's generation config. The same model,
    prompts and seed give the same answers on the same machine, and no other random state changes. If memory
    runs out, batches become smaller, which draws other answers; if a single answer does not fit, the device's
    error is raised. An answer is cut earlier where a longer prompt of its batch reaches the last position
    that the model has an embedding for.

    `policy` is the `PolicyModel` of `model` and `attention`, or what wraps it. Every prompt is shorter than
    `max_length`.
    """
    assert all(0 < len(prompt) < max_length for prompt in prompts)
    answers: list[Answer] = []
    at_once = min(MOST_AT_ONCE, attention.max_rows or MOST_AT_ONCE)
    with ready_to_generate(model, attention):
        while len(answers) < len(prompts):
            batch = prompts[len(answers) : len(answers) + at_once]
            try:
                with _random_state(model.device, [*seed, len(answers)]):
                    answers += _write_batch(policy, model, batch, max_length, end_ids, pad_id)
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error, model.device):
                    raise
                at_once = len(batch) // 2
            if model.device.type == "cuda":
                torch.cuda.empty_cache()  # the odd sizes of keys and values are of no use to training
    return answers


@contextmanager
def ready_to_generate(model: PreTrainedModel, attention: AttentionChoice) -> Iterator[None]:
    """The model with its original attention, and without the repetition penalties, suppressed tokens and the
    like of its own generation config.
    """
    config, has_forest = model.generation_config, model.config._attn_implementation == FOREST_ATTENTION
    if has_forest:
        assert attention.original is not None
        set_attention(model, attention.original)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
        if has_forest:
            use_forest_attention(model)


@contextmanager
def _random_state(device: torch.device, seed: Sequence[int]) -> Iterator[None]:
    """Random numbers that depend only on the seed; afterwards the random state is as before."""
    number = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]) >> 1
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
    policy: torch.nn.Module,
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    max_length: int,
    end_ids: Sequence[int],
    pad_id: int,
) -> list[Answer]:
    """Answers to left-padded prompts, by one call of `generate`."""
    width = max(map(len, prompts))
    positions = most_positions(model.config) or np.inf
    room = [int(min(max_length - len(prompt), positions - width)) for prompt in prompts]
    ids, mask = np.full((len(prompts), width), pad_id, np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(room),
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    room_B = torch.tensor(room, device=model.device)
    output = policy(
        generate={
            "input_ids": torch.from_numpy(ids).to(model.device),
            "attention_mask": torch.from_numpy(mask).to(model.device),
            "generation_config": config,
            # each row ends after its own number of new tokens
            "stopping_criteria": StoppingCriteriaList([lambda ids, *_, **__: ids.shape[1] - width >= room_B]),
        }
    )
    written = output[:, width:].cpu().numpy().astype(np.uint32)
    return [_answer(tokens[:most], end_ids) for tokens, most in zip(written, room, strict=True)]


def _answer(tokens: np.ndarray, end_ids: Sequence[int]) -> Answer:
    """The tokens up to the first end token; those after it are padding."""
    ends = np.flatnonzero(np.isin(tokens, end_ids))
    return Answer(tokens[: ends[0] + 1] if len(ends) else tokens, bool(len(ends)))
