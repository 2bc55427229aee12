"""The date that a chat template writes, if its text depends on the date: that of the pair set's first run.

Otherwise the token ids, and so the keys of the scores, would change daily. The manifest records the day as
`tokenization.template_date`. Until there is a manifest, `pairs/NAME/SPLIT/.template-date.json` does, so that
a run that is interrupted resumes on another day with the scores that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from transformers import PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.log import Log
from dpo_cache.store import Cache
from dpo_cache.store.format.documents import Document, read_sealed, seal_document

RECORD = ".template-date.json"


def choose_template_dates(
    cache: Cache, pair_sets: Sequence[str], tokenizer: PreTrainedTokenizerBase, given: str | None, log: Log
) -> list[date | None]:
    """The day for each pair set: the one `given`, else that of its first run, else that of another of these
    pair sets, else today; None if the template does not depend on the day.
    """
    if not data.writes_day(tokenizer):
        if given:
            log(f"`template_date` {given} has no effect: the chat template does not write the day.")
        return [None] * len(pair_sets)
    recorded = [recorded_day(cache, pair_set) for pair_set in pair_sets]
    first = next(filter(None, recorded), None) or today()
    days = [date.fromisoformat(given) if given else day or first for day in recorded]
    for day in dict.fromkeys(days):
        log(
            f"the chat template writes the day: {day}, which later runs of the pair set write, too. "
            "Another can be given as `template_date`."
        )
    return list(days)


def today() -> date:
    """The day on this machine."""
    return date.today()


def recorded_day(cache: Cache, pair_set: str) -> date | None:
    """The day of the pair set's first run, if there was one."""
    if cache.holds_pairs(pair_set):
        return data.template_date_of(cache.pairs(pair_set).manifest)
    record = f"pairs/{pair_set}/{RECORD}"
    if not cache.folder.exists(record):
        return None
    return data.template_date_of(read_sealed(cache.folder, record))


def record_day(cache: Cache, pair_set: str, day: date | None) -> None:
    """Record the day of a first run, before it publishes anything."""
    if day is not None and not cache.holds_pairs(pair_set):
        cache.publish_format()
        document = {"tokenization": describe_day(day)}
        cache.folder.publish(f"pairs/{pair_set}/{RECORD}", seal_document(document))


def describe_day(day: date | None) -> Document:
    """The day as a member of a manifest's `tokenization`; empty without a day."""
    return {} if day is None else {"template_date": day.isoformat()}


def forget_day(cache: Cache, pair_set: str, day: date | None) -> None:
    """Remove the record, once the manifest has the day."""
    if day is not None:
        cache.folder.remove(f"pairs/{pair_set}/{RECORD}")
