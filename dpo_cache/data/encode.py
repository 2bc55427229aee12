"""Texts -> ids, as the tokenizer's own call makes them, but faster.

Every text of a row begins with the prompt: the prompt itself, and prompt + answer for each answer. A
tokenizer cuts a text at its special tokens first and encodes the parts independently, so the part of a
rendered prompt before its last special token is encoded once, and each text only from that token on. Plain
text is cut between two words of the prompt instead, with tokenizers for which such a cut provably changes no
id; see `boundary.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from dpo_cache.data.boundary import can_be_cut, last_cut
from dpo_cache.tokenizer import without_padding


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """Equals `tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]`."""
    if not texts:
        return []
    if not _is_plainly_fast(tokenizer):
        return tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)[
            "input_ids"
        ]
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    with without_padding(backend):
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [
            encoding.ids
            for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        ]


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Ids of groups of texts that begin alike: `encode_texts` without special tokens added, of each group."""
    cutting = _cutting_tokens(tokenizer) if groups else []
    heads = [_shared_head(group, cutting) for group in groups]
    parts: list[str] = []
    for group, head in zip(groups, heads, strict=True):
        parts += [group[0][: head[1]], *(text[head[0] :] for text in group)] if head else group
    ids = iter(encode_texts(tokenizer, parts, add_special_tokens=False))
    found: list[list[list[int]]] = []
    for group, head in zip(groups, heads, strict=True):
        start = next(ids) if head else []
        tails = list(islice(ids, len(group)))
        if not head:
            found.append(tails)
        elif all(tail[0] == start[-1] for tail in tails):  # both sides have the special token as one token
            found.append([start + tail[1:] for tail in tails])
        else:
            found.append(encode_texts(tokenizer, group, add_special_tokens=False))
    return found


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Ids of groups of a text and continuations of it: `encode_texts` with special tokens added, of each
    group.
    """
    is_cut = groups and _is_plainly_fast(tokenizer) and can_be_cut(tokenizer)
    around = _added_around(tokenizer) if is_cut else None
    if around is None:
        whole = [text for group in groups for text in group]
        ids = iter(encode_texts(tokenizer, whole, add_special_tokens=True))
        return [list(islice(ids, len(group))) for group in groups]
    before, after = around
    parts: list[str] = []
    for group in groups:
        cut = last_cut(group[0])
        parts += [group[0][:cut], *(text[cut:] for text in group)]
    ids = iter(encode_texts(tokenizer, parts, add_special_tokens=False))
    heads = (before + next(ids) for _ in groups)
    return [
        [head + tail + after for tail in islice(ids, len(group))]
        for group, head in zip(groups, heads, strict=True)
    ]


def _is_plainly_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's call does no more than its Rust backend."""
    return (
        isinstance(tokenizer, TokenizersBackend)
        and type(tokenizer)._encode_plus is TokenizersBackend._encode_plus
    )


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Ids that are added before and after any text; None if they differ between two texts."""
    around = []
    for text in ("a", "b c"):
        (bare,) = encode_texts(tokenizer, [text], add_special_tokens=False)
        (full,) = encode_texts(tokenizer, [text], add_special_tokens=True)
        num_starts = len(full) - len(bare) + 1
        starts = [start for start in range(num_starts) if full[start : start + len(bare)] == bare]
        if len(starts) != 1:
            return None
        around.append((full[: starts[0]], full[starts[0] + len(bare) :]))
    return around[0] if around[0] == around[1] else None


def _cutting_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens at which a text can be cut in two that are encoded independently: they take no spaces,
    and are no part of another token.

    Only those that the chat template writes: some tokenizers keep a thousand in reserve.
    """
    if not _is_plainly_fast(tokenizer) or tokenizer.split_special_tokens:
        return []
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()  # type: ignore[attr-defined]
    written = f"{tokenizer.chat_template} {tokenizer.eos_token}"
    return [
        token.content
        for token in added
        if token.special
        and token.content in written
        and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and not any(token.content in other.content and token.content != other.content for other in added)
    ]


def _shared_head(group: Sequence[str], cutting: Sequence[str]) -> tuple[int, int] | None:
    """Start and end of the first text's last special token, if all texts are the same up to its end."""
    start, special = max(((group[0].rfind(special), special) for special in cutting), default=(-1, ""))
    end = start + len(special)
    return (start, end) if start > 0 and all(text.startswith(group[0][:end]) for text in group) else None
