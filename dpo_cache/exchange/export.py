"""store -> a file that other tools read: one row a pair, with its text, token ids and log-probs.

Columns, in this order:

    prompt, chosen, rejected      text, or messages with role and content; tools, chat_template_kwargs if the
                                  rows have them. Only if the source still makes the same pairs; see
                                  `source_text.py`
    row                           int64, row number in the source
    prompt_ids                    list<uint32>
    rejected_prompt_ids           list<uint32>, prompt of rejected; only in sets made with keep-end
    chosen_ids, rejected_ids      list<uint32>
    ref_chosen_logps, ref_rejected_logps               float64, sums in nats
    ref_chosen_token_logps, ref_rejected_token_logps   list<float32>, with `token_logps`
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_cache.errors import NotInCacheError
from dpo_cache.exchange.html import export_html
from dpo_cache.exchange.source_text import SourceText, TextRow, find_source_text
from dpo_cache.files.locations import check_output
from dpo_cache.files.rows import open_output
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.options.exchange import ExportOptions
from dpo_cache.options.keywords import keywords_of, make_options
from dpo_cache.progress import bars_hidden
from dpo_cache.store import PairSet, open_cache
from dpo_cache.store.format.checks import check_details
from dpo_cache.types import ScoredPair

BATCH_PAIRS = 2048  # written at once: one row group of a Parquet file

TOKEN_IDS, LOGPS = pa.list_(pa.uint32()), pa.list_(pa.float32())


@dataclass
class ExportReport:
    """Counts and places of the files that `export_pairs` wrote."""

    pairs: str
    out: str
    format: str
    num_pairs: int = 0
    columns: list[str] = field(default_factory=list)
    has_text: bool = False
    left_out: list[str] = field(default_factory=list)  # facts about the pair set that the output lacks
    bytes_written: int = 0
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<ExportReport of {self.pairs} to {self.out}: {self.num_pairs:,} pairs, {self.format}>"

    def _repr_html_(self) -> str:
        return export_html(self)


@keywords_of(ExportOptions)
@keeps_remarks
@bars_hidden("datasets")
def export_pairs(
    cache: str | os.PathLike[str],
    pairs: str,
    output: str | os.PathLike[str] | None = None,
    *,
    log: Log | None = None,
    **options: Any,
) -> ExportReport:
    """Write a pair set to a Parquet or JSONL file or a folder of `datasets`, with the columns of the module's
    docstring.

    The output is streamed, so memory stays flat, and appears under its name when it is complete. `log` gets
    each remark (default: the logger `dpo_cache`); the report lists them, too. Raises `DpoCacheError`.
    """
    given = {"cache": cache, "pairs": pairs, **({} if output is None else {"output": output}), **options}
    chosen = make_options(ExportOptions, given, log)
    pair_set = open_cache(chosen.cache).pairs(chosen.pairs)
    check_details(pair_set.manifest, f"{chosen.cache}/pairs/{pair_set.name}/manifest.json")
    if chosen.token_logps and not pair_set.has_token_logps:
        raise NotInCacheError(
            f"{chosen.cache}: {pair_set.name} was imported with sums only.\nLeave out `token_logps`."
        )
    report = ExportReport(pair_set.name, chosen.output, chosen.output_format)
    check_output(chosen.output, report.format, overwrite=chosen.overwrite)
    text = _find_text(chosen, pair_set, report, log or log_remark)
    _note_losses(chosen, pair_set, report)
    schema = _schema(chosen, pair_set, text)
    rows: Iterator[TextRow] = map(_id_row, pair_set)
    if text is not None:
        rows = ({**texts, **ids} for texts, ids in zip(text, rows, strict=True))
    with open_output(chosen.output, report.format, schema, overwrite=chosen.overwrite) as write:
        while batch := list(islice(rows, BATCH_PAIRS)):
            write(batch)
            report.num_pairs += len(batch)
    report.columns, report.has_text = schema.names, text is not None
    report.bytes_written = _size(Path(chosen.output).expanduser())
    return report


def _find_text(
    options: ExportOptions, pair_set: PairSet, report: ExportReport, log: Log
) -> SourceText | None:
    """The texts of the pairs; None, with a remark, where they are not found."""
    if not options.text:
        return None
    text = find_source_text(pair_set.manifest, dataset=options.dataset, tokenizer=options.tokenizer)
    if isinstance(text, str):
        report.left_out.append(f"prompt, chosen and rejected as text: {text}")
        log(f"left out: {report.left_out[-1]}.")
        return None
    return text


def _note_losses(options: ExportOptions, pair_set: PairSet, report: ExportReport) -> None:
    if pair_set.has_token_logps and not options.token_logps:
        report.left_out.append("the log-prob of each token (`token_logps` adds it)")
    report.left_out.append("the reference, tokenizer and truncation of the values (they stay in the cache)")
    if report.format == "jsonl":
        report.left_out.append("the types of the columns (JSON has only numbers; no value is changed)")


def _schema(options: ExportOptions, pair_set: PairSet, text: SourceText | None) -> pa.Schema:
    fields = [*text.schema] if text else []
    fields += [pa.field("row", pa.int64()), pa.field("prompt_ids", TOKEN_IDS)]
    if pair_set.manifest["tokenization"]["truncation"] == "keep-end":  # then prompts may differ
        fields.append(pa.field("rejected_prompt_ids", TOKEN_IDS))
    fields += [pa.field("chosen_ids", TOKEN_IDS), pa.field("rejected_ids", TOKEN_IDS)]
    fields += [pa.field("ref_chosen_logps", pa.float64()), pa.field("ref_rejected_logps", pa.float64())]
    if options.token_logps:
        fields += [pa.field("ref_chosen_token_logps", LOGPS), pa.field("ref_rejected_token_logps", LOGPS)]
    return pa.schema(fields)


def _id_row(scored: ScoredPair) -> TextRow:
    pair = scored.pair
    return {
        "row": pair.row,
        "prompt_ids": pair.chosen.prompt_ids,
        "rejected_prompt_ids": pair.rejected.prompt_ids,
        "chosen_ids": pair.chosen.completion_ids,
        "rejected_ids": pair.rejected.completion_ids,
        "ref_chosen_logps": scored.ref_chosen.logps,
        "ref_rejected_logps": scored.ref_rejected.logps,
        "ref_chosen_token_logps": scored.ref_chosen.token_logps,
        "ref_rejected_token_logps": scored.ref_rejected.token_logps,
    }


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
