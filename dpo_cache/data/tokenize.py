"""Examples -> token ids, the same that TRL 1.16 makes with the same tokenizer and template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_cache.data.formats import Example, parse_row
from dpo_cache.errors import DataError, ModelError, first_line

IDS_VERSION = 1  # raised when the same text would get other ids from us
COLUMNS = ("row", "prompt_ids", "chosen_ids", "rejected_ids", "moved_boundary")


def load_tokenizer(
    location: str, *, revision: str | None = None, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer, with another chat template (a file's path) if one is given. Raises `ModelError`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{location}: no tokenizer can be loaded from it ({first_line(error)}).\nSay where it is with --tokenizer.") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat-template {chat_template}: not readable ({error}).") from error
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of what decides the ids: vocabulary, rules, special tokens and template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):  # what the last call happened to set, not what the tokenizer is
        rules.pop("padding", None), rules.pop("truncation", None)
    splits = str(getattr(tokenizer, "split_special_tokens", False))
    parts = [type(tokenizer).__name__, json.dumps(rules), str(tokenizer.special_tokens_map), splits, str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tokenize_rows(dataset: Dataset, data_format: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of every row, untruncated: columns row, prompt_ids, chosen_ids, rejected_ids, moved_boundary.

    Text is tokenized as prompt and prompt + answer, the answer ending in the EOS token; conversations go
    through the chat template, the prompt alone with its generation prompt. The answer starts where the
    ids of prompt and prompt + answer part, so no answer token is lost where tokens merge across the
    boundary; `moved_boundary` marks those rows. Kept in the cache of `datasets`, keyed by data and tokenizer.

    Raises `ModelError` for conversations without a chat template, or text without an EOS token.
    """
    _check_tokenizer(tokenizer, data_format, dataset[0])
    recipe = [dataset._fingerprint, data_format, tokenizer_digest(tokenizer), str(IDS_VERSION)]

    def tokenize_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [parse_row(row, data_format) for row in rows]
        assert all(isinstance(example, Example) for example in examples), "rows are checked before they are tokenized"
        return {"row": numbers, **_tokenize_examples(examples, tokenizer)}  # type: ignore[arg-type]

    return dataset.map(
        tokenize_batch, batched=True, with_indices=True, remove_columns=dataset.column_names,
        new_fingerprint=hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:32],
    )  # fmt: skip


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, data_format: str, first_row: dict[str, Any]) -> None:
    example = parse_row(first_row, data_format)
    assert isinstance(example, Example)
    if isinstance(example.prompt, list) and not tokenizer.chat_template:
        raise ModelError(
            f"the data holds conversations, but the tokenizer {tokenizer.name_or_path} has no chat template.\n"
            "Give one with --chat-template FILE (Jinja), or a tokenizer that has one with --tokenizer."
        )
    if isinstance(example.prompt, str) and tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer {tokenizer.name_or_path} has no EOS token to end an answer with.\nGive another with --tokenizer.")


def _tokenize_examples(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    texts = _plain_texts(examples, tokenizer.eos_token) if isinstance(examples[0].prompt, str) else _rendered_texts(examples, tokenizer)
    ids = tokenizer(texts, add_special_tokens=isinstance(examples[0].prompt, str), return_attention_mask=False)["input_ids"]
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS[1:]}
    for prompt, with_chosen, with_rejected in zip(ids[0::3], ids[1::3], ids[2::3], strict=True):
        cut = min(_shared_prefix(prompt, with_chosen), _shared_prefix(prompt, with_rejected))
        columns["prompt_ids"].append(prompt[:cut])
        columns["chosen_ids"].append(with_chosen[cut:])
        columns["rejected_ids"].append(with_rejected[cut:])
        columns["moved_boundary"].append(cut < len(prompt))
    return columns


def _plain_texts(examples: list[Example], eos: str) -> list[str]:
    """Three texts an example: prompt, prompt + chosen, prompt + rejected."""
    texts = []
    for example in examples:
        answers = (example.chosen, example.rejected)
        ended = [answer if answer.endswith(eos) else answer + eos for answer in answers]  # type: ignore[union-attr, operator]
        texts += [example.prompt, example.prompt + ended[0], example.prompt + ended[1]]  # type: ignore[operator]
    return texts  # type: ignore[return-value]


def _rendered_texts(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Three texts an example, through the chat template."""

    def render(conversations: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(conversations, tokenize=False, **options)

    try:
        prompts = render([example.prompt for example in examples], add_generation_prompt=True)
        chosen = render([example.prompt + example.chosen for example in examples])  # type: ignore[operator]
        rejected = render([example.prompt + example.rejected for example in examples])  # type: ignore[operator]
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(f"the chat template refuses a conversation ({error}).\nMend the rows, or give another with --chat-template.") from error
    return [text for three in zip(prompts, chosen, rejected, strict=True) for text in three]


def _shared_prefix(ids: list[int], other: list[int]) -> int:
    if other[: len(ids)] == ids:
        return len(ids)
    return next((place for place, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two), min(len(ids), len(other)))
