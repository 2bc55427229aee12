"""Texts -> ids, as the tokenizer's own call makes them, but faster.

A rendered conversation stands in every text of its row: alone, and before each answer. A tokenizer cuts its
text at the special tokens first and treats the parts by themselves, so what comes before the last special
token of the prompt is encoded once, and each text only from that token on. Plain text is cut between two
words of the prompt instead, where the tokenizer is one of those for which that provably changes no id; see
`boundary.py`.
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
        end, special = head or (0, "")
        parts += [group[0][:end], *(special + text[end:] for text in group)] if head else group
    ids = iter(encode_texts(tokenizer, parts, add_special_tokens=False))
    found: list[list[list[int]]] = []
    for group, head in zip(groups, heads, strict=True):
        if head is None:
            found.append(list(islice(ids, len(group))))
            continue
        start, tails = next(ids), list(islice(ids, len(group)))
        if all(tail[0] == start[-1] for tail in tails):  # the special token was taken as one on both sides
            found.append([start + tail[1:] for tail in tails])
        else:
            found.append(encode_texts(tokenizer, group, add_special_tokens=False))
    return found


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Ids of groups of a text and texts that go on from it: `encode_texts` with special tokens added, of each
    group.
    """
    cuts = [0] * len(groups)
    before: list[int] = []
    after: list[int] = []
    if groups and _is_plainly_fast(tokenizer) and can_be_cut(tokenizer):
        around = _added_around(tokenizer)
        if around is not None:
            before, after = around
            cuts = [last_cut(group[0]) for group in groups]
    whole = [text for group, cut in zip(groups, cuts, strict=True) if not cut for text in group]
    parts = [
        part
        for group, cut in zip(groups, cuts, strict=True)
        if cut
        for part in (group[0][:cut], *(text[cut:] for text in group))
    ]
    whole_ids = iter(encode_texts(tokenizer, whole, add_special_tokens=True))
    part_ids = iter(encode_texts(tokenizer, parts, add_special_tokens=False))
    found: list[list[list[int]]] = []
    for group, cut in zip(groups, cuts, strict=True):
        if not cut:
            found.append(list(islice(whole_ids, len(group))))
            continue
        head = before + next(part_ids)
        found.append([head + tail + after for tail in islice(part_ids, len(group))])
    return found


def _is_plainly_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its call does no more than its Rust backend."""
    return (
        isinstance(tokenizer, TokenizersBackend)
        and type(tokenizer)._encode_plus is TokenizersBackend._encode_plus
    )


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Ids that are added before and after any text; None where it is not the same for two."""
    around = []
    for text in ("a", "b c"):
        (bare,) = encode_texts(tokenizer, [text], add_special_tokens=False)
        (full,) = encode_texts(tokenizer, [text], add_special_tokens=True)
        starts = [
            start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare
        ]
        if len(starts) != 1:
            return None
        around.append((full[: starts[0]], full[starts[0] + len(bare) :]))
    return around[0] if around[0] == around[1] else None


def _cutting_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that part a text in two that are encoded as if alone: they take no spaces, and are no
    part of another.

    Only those that the chat template writes: some tokenizers keep a thousand in reserve.
    """
    if not _is_plainly_fast(tokenizer) or tokenizer.split_special_tokens:
        return []
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()  # type: ignore[attr-defined]
    written = f"{tokenizer.chat_template} {tokenizer.eos_token}"
    plain = [
        token
        for token in added
        if token.special
        and token.content in written
        and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    contents = [token.content for token in added]
    return [
        token.content
        for token in plain
        if not any(token.content in other and token.content != other for other in contents)
    ]


def _shared_head(group: Sequence[str], cutting: Sequence[str]) -> tuple[int, str] | None:
    """Where the last special token of the first text ends, if all texts agree up to there, and that token."""
    last = max(((group[0].rfind(special), special) for special in cutting), default=(-1, ""))
    if last[0] <= 0:
        return None
    end = last[0] + len(last[1])
    return (end, last[1]) if all(text.startswith(group[0][:end]) for text in group) else None
