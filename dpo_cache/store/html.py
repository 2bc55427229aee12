"""Caches and pair sets as HTML, for notebooks. Reads their JSON files and the first block of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.errors import CacheError, first_line
from dpo_cache.notebook.html import card, facts, note, table
from dpo_cache.store.cache import Cache, read_reference
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.upkeep.contents import describe_quantization
from dpo_cache.types import Pair

if TYPE_CHECKING:
    from dpo_cache.store.pairs import PairSet

ENTRIES = 20  # references, and pair sets, that are shown
FIRST_PAIRS = 5


def cache_html(cache: Cache) -> str:
    """The cache's pair sets and references. A damaged one is listed with its problem."""
    try:
        names, references = cache.pair_sets(), cache.references()
    except CacheError as error:
        return card(f"Cache {cache}", note(first_line(error)))
    sets = [_pair_set_row(cache, name) for name in names[:ENTRIES]]
    rows = [[entry[:12], *_reference_cells(cache.folder, entry)] for entry in references[:ENTRIES]]
    return card(
        f"Cache {cache}",
        table(("pair set", "pairs", "reference", "source", "made"), sets) if sets else note("No pair sets."),
        _rest(names, "pair sets"),
        table(("reference", "model", "dtype"), rows) if rows else note("No references."),
        _rest(references, "references"),
    )


def pair_set_html(pairs: PairSet, folder: Folder) -> str:
    """The pair set's origin and its first pairs; `folder` is that of its cache."""
    manifest = pairs.manifest
    source, tokenization = manifest.get("source", {}), manifest.get("tokenization", {})
    rows = [
        ("pairs", f"{len(pairs):,}"),
        ("reference", pairs.reference_id[:12]),
        ("model", ", ".join(filter(None, _reference_cells(folder, pairs.reference_id)))),
        ("log-probs", _origin(pairs)),
        ("source", str(source.get("dataset") or "")),
        ("made", str(source.get("created") or "")),
        ("max_length", str(tokenization.get("max_length") or "")),
    ]
    return card(f"Pair set {pairs.name}", facts(rows), _first_pairs(pairs))


def _origin(pairs: PairSet) -> str:
    detail = "one for each token" if pairs.has_token_logps else "only sums of answers"
    return f"imported, {detail}" if pairs.is_imported else detail


def _first_pairs(pairs: PairSet) -> str:
    try:
        first = pairs[:FIRST_PAIRS]
    except CacheError as error:
        return note(first_line(error))
    rows = [
        [
            str(number),
            _prompt_tokens(scored.pair),
            f"{len(scored.pair.chosen.completion_ids):,}",
            f"{len(scored.pair.rejected.completion_ids):,}",
            f"{scored.ref_chosen.logps:,.2f}",
            f"{scored.ref_rejected.logps:,.2f}",
        ]
        for number, scored in enumerate(first)
    ]
    titles = ("prompt tokens", "chosen tokens", "rejected tokens", "ref chosen logps", "ref rejected logps")
    shown = f"The first {len(rows)} pairs; " if len(rows) < len(pairs) else ""
    return table(("pair", *titles), rows) + note(
        f"{shown}logps: the reference's log-probs in nats, summed over the answer."
    )


def _prompt_tokens(pair: Pair) -> str:
    """The prompt's length; two, where the answers have prompts of different lengths."""
    lengths = (len(pair.chosen.prompt_ids), len(pair.rejected.prompt_ids))
    return " and ".join(f"{length:,}" for length in dict.fromkeys(lengths))


def _pair_set_row(cache: Cache, name: str) -> list[str]:
    try:
        pairs = cache.pairs(name)
    except CacheError as error:
        return [name, "", "", first_line(error), ""]
    source = pairs.manifest.get("source", {})
    origin = [str(source.get(key) or "?") for key in ("dataset", "created")]
    return [name, f"{len(pairs):,}", pairs.reference_id[:12], *origin]


def _reference_cells(folder: Folder, reference_id: str) -> tuple[str, str]:
    try:
        return _describe(read_reference(folder, reference_id))
    except CacheError as error:
        return first_line(error), ""


def _describe(reference: Document) -> tuple[str, str]:
    """The model's name when it was scored, or the user's name for an imported reference; and its dtype."""
    identity, provenance = reference["identity"], reference["provenance"]
    imported = identity.get("imported")
    model = f"{imported} (imported)" if imported else provenance.get("model") or provenance.get("described")
    words = (identity.get("dtype"), describe_quantization(identity))
    return str(model or "?"), ", ".join(str(word) for word in words if word)


def _rest(entries: list[str], noun: str) -> str:
    return note(f"… and {len(entries) - ENTRIES:,} other {noun}") if len(entries) > ENTRIES else ""
