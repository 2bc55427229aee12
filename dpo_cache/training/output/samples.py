"""Answers of the policy to evaluation prompts, and `RUN/samples.jsonl`.

One line for each answer: `step`, `row` of the evaluation data, `prompt`, the `chosen` answer, the policy's
`sample`, its `num_tokens` with the end token, and `finished`: true if the policy wrote an end token, false if
it was cut at the pair set's longest prompt + answer. The prompt has its special tokens, as the model reads
it; the answers are without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.generation import Answer, write_answers
from dpo_cache.lm.positions import most_positions
from dpo_cache.training.batches import stream_pairs
from dpo_cache.training.before_loading import check_can_answer
from dpo_cache.training.output.metrics_file import MetricsFile
from dpo_cache.training.setup import Setup
from dpo_cache.types import ScoredPair

FILE = "samples.jsonl"
SHOWN = 80  # characters of a prompt's end, and of an answer's start, in a remark


def open_sampler(setup: Setup, policy: torch.nn.Module) -> Sampler | None:
    """A sampler for the first distinct evaluation prompts; None if `sample` is 0. Raises `TrainingError`.

    With several ranks, the main one writes the answers; if each has a shard, the others take part.
    """
    data, model, num_prompts = setup.data, setup.policy.model, setup.options.sample
    takes_part = setup.ranks.is_main or setup.ranks.shards
    if not num_prompts or data.eval_pairs is None or not takes_part:
        return None
    check_can_answer(model, num_prompts)
    positions = most_positions(model.config)
    longest = data.eval_pairs.manifest["tokenization"]["max_length"]
    max_length = min(longest, positions or longest)
    pairs = stream_pairs(data.eval_pairs, data.eval_selected, shuffle=False, seed=0, epoch=0)
    prompts = _distinct_prompts(pairs, num_prompts, max_length)
    if len(prompts) < num_prompts:
        setup.log(
            f"`sample` {num_prompts}: the evaluation pairs have {len(prompts)} distinct prompts shorter "
            f"than {max_length} tokens; those are answered."
        )
    return Sampler(setup, policy, MetricsFile(setup.output / FILE), prompts, max_length)


@dataclass(frozen=True)
class Sampler:
    """Writes the policy's answers to the same prompts; the random draws depend only on seed and step."""

    setup: Setup
    policy: torch.nn.Module
    file: MetricsFile
    prompts: list[ScoredPair]
    max_length: int  # most tokens of prompt and answer together

    def write(self, step: int) -> None:
        """Write the policy's answers after a step; if not even one fits into memory, log a remark instead."""
        trained = self.setup.policy
        model, tokenizer = trained.model, trained.tokenizer
        end_ids = end_tokens(model, tokenizer)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end_ids or [0])[0]
        try:
            answers = write_answers(
                self.policy,
                [scored.pair.chosen.prompt_ids for scored in self.prompts],
                model=model,
                attention=trained.attention,
                max_length=self.max_length,
                end_ids=end_ids,
                pad_id=pad_id,
                seed=[self.setup.options.seed, step],
            )
        except RuntimeError as error:
            if self.setup.ranks.shards or not is_out_of_memory(error, model.device):
                raise
            self.setup.log(
                f"step {step}: there is not enough memory to sample an answer during the training; "
                f"none is in {FILE}. The run continues."
            )
            return
        if not self.setup.ranks.is_main:
            return
        both = zip(self.prompts, answers, strict=True)
        lines = [self._line(step, scored, answer) for scored, answer in both]
        for line in lines:
            self.file.append(line)
        if lines:
            prompt, sample = lines[0]["prompt"], lines[0]["sample"]
            end = prompt if len(prompt) <= SHOWN else f"…{prompt[-SHOWN:]}"
            start = sample if len(sample) <= SHOWN else f"{sample[:SHOWN]}…"
            self.setup.log(f"step {step}, sample of row {lines[0]['row']}: {end!r} -> {start!r}")

    def _line(self, step: int, scored: ScoredPair, answer: Answer) -> dict:
        tokenizer, chosen = self.setup.policy.tokenizer, scored.pair.chosen
        return {
            "step": step,
            "row": scored.pair.row,
            "prompt": tokenizer.decode(chosen.prompt_ids.tolist()),
            "chosen": tokenizer.decode(chosen.completion_ids.tolist(), skip_special_tokens=True),
            "sample": tokenizer.decode(answer.token_ids.tolist(), skip_special_tokens=True),
            "num_tokens": len(answer.token_ids),
            "finished": answer.is_finished,
        }


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation config, such as the
    end of a turn.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return sorted({token for token in known if token is not None})


def _distinct_prompts(pairs: Iterable[ScoredPair], num_prompts: int, max_length: int) -> list[ScoredPair]:
    """The first pair of each of the first prompts that leave room for an answer."""
    found: dict[bytes, ScoredPair] = {}
    for scored in pairs:
        prompt_ids = scored.pair.chosen.prompt_ids
        if len(prompt_ids) < max_length:
            found.setdefault(prompt_ids.tobytes(), scored)
        if len(found) == num_prompts:
            break
    return list(found.values())
