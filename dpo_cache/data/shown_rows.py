"""Rows decoded, as they are scored: where the prompt ends, what is cut off and what is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_cache.data.survey import Survey
from dpo_cache.data.truncate import Dropped, Outcome, Truncation, make_pairs
from dpo_cache.types import Completion, TokenIds, split_lists


@dataclass(frozen=True)
class ShownSide:
    """A completion as text, with its special tokens; the four parts are the whole sequence, in order."""

    cut_before: str
    prompt: str
    answer: str
    cut_after: str
    num_tokens: tuple[int, int, int, int]  # tokens of the parts


@dataclass(frozen=True)
class ShownRow:
    """A pair of a row as text, and what happened to it."""

    row: int
    chosen: ShownSide
    rejected: ShownSide
    dropped: str | None = None  # the reason; then nothing is cut off
    was_cut: bool = False
    moved_boundary: bool = False
    notes: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()  # those that are in it


def show_rows(
    windows: Sequence[Dataset],
    survey: Survey,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    num_rows: int,
) -> list[ShownRow]:
    """`num_rows` of the tokenized rows, spread evenly from the first to the last, then one more row for each
    finding of the survey that none of them has: dropped for a reason, cut, with an early answer, with a note.
    """
    numbers = [np.asarray(window.with_format("numpy")["row"]) for window in windows]
    starts = np.cumsum([0, *map(len, numbers)])
    rows = np.concatenate(numbers)
    places = sorted({*np.linspace(0, len(rows) - 1, num_rows).round().astype(int).tolist()})
    shown = [_show(windows, starts, place, tokenizer, truncation) for place in places]
    for kind, finding in _findings(survey):
        if not any(kind in _kinds(row) for row in shown):
            place = int(np.searchsorted(rows, finding))
            shown.append(_show(windows, starts, place, tokenizer, truncation))
    return shown


def _findings(survey: Survey) -> Iterator[tuple[str, int]]:
    """The findings of the survey, in the words of `_kinds`, and the first row of each finding."""
    for reason, finding in survey.dropped.items():
        yield reason, finding.rows[0]
    for kind, finding in (("cut", survey.truncated), ("early", survey.moved_boundary)):
        if finding.rows:
            yield kind, finding.rows[0]
    for note, finding in survey.notes.items():
        yield note, finding.rows[0]


def _kinds(shown: ShownRow) -> set[str]:
    """The findings in a row."""
    happened = {"cut": shown.was_cut, "early": shown.moved_boundary, shown.dropped: shown.dropped}
    return {*shown.notes, *(kind for kind, has_happened in happened.items() if kind and has_happened)}


def _show(
    windows: Sequence[Dataset],
    starts: np.ndarray,
    place: int,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
) -> ShownRow:
    """The tokenized row at this place in all windows; `starts` are the places where windows start."""
    number = int(np.searchsorted(starts, place, side="right")) - 1
    row = windows[number].select([place - int(starts[number])])
    (outcome,) = make_pairs(row, truncation)
    table = row.with_format("arrow")[:]
    (prompt,), (chosen,), (rejected,) = (
        split_lists(table.column(name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    is_end = truncation.mode == "keep-end"
    kept = _kept(outcome)
    sides = (
        _side(tokenizer, prompt, chosen, kept[0], is_end=is_end),
        _side(tokenizer, prompt, rejected, kept[1], is_end=is_end),
    )
    text = "".join(part for side in sides for part in _texts(side))
    return ShownRow(
        outcome.row,
        sides[0],
        sides[1],
        dropped=outcome.pair.reason if isinstance(outcome.pair, Dropped) else None,
        was_cut=outcome.was_cut,
        moved_boundary=outcome.moved_boundary,
        notes=outcome.notes,
        special_tokens=tuple(token for token in _special_tokens(tokenizer) if token in text),
    )


def _kept(outcome: Outcome) -> tuple[Completion | None, Completion | None]:
    pair = outcome.pair
    return (None, None) if isinstance(pair, Dropped) else (pair.chosen, pair.rejected)


def _side(
    tokenizer: PreTrainedTokenizerBase,
    prompt: TokenIds,
    answer: TokenIds,
    kept: Completion | None,
    *,
    is_end: bool,
) -> ShownSide:
    """The parts of prompt + answer, of which truncation left `kept`, or all of it; `is_end`: its end."""
    ids = np.concatenate([prompt, answer])
    if kept is None:
        start, boundary, end = 0, len(prompt), len(ids)
    else:
        start = len(ids) - len(kept) if is_end else len(prompt) - len(kept.prompt_ids)
        boundary = start + len(kept.prompt_ids)
        end = start + len(kept)
    before, prompt_text, answer_text, after = _decode_parts(
        tokenizer, ids, [0, start, boundary, end, len(ids)]
    )
    sizes = (start, boundary - start, end - boundary, len(ids) - end)
    return ShownSide(before, prompt_text, answer_text, after, sizes)


def _decode_parts(tokenizer: PreTrainedTokenizerBase, ids: TokenIds, places: Sequence[int]) -> list[str]:
    """The texts between these places.

    A text is decoded with all that comes before it, which may change its first letters: tokens of a tokenizer
    from SentencePiece lose a space at the start. Where a place is within a letter, each text is decoded
    separately.
    """

    def decode(part: TokenIds) -> str:
        return str(
            tokenizer.decode(part.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    heads = [decode(ids[:place]) for place in places]
    return [
        heads[number + 1][len(heads[number]) :]
        if heads[number + 1].startswith(heads[number])
        else decode(ids[places[number] : places[number + 1]])
        for number in range(len(places) - 1)
    ]


def _texts(side: ShownSide) -> tuple[str, str, str, str]:
    return side.cut_before, side.prompt, side.answer, side.cut_after


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})
