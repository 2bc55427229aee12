"""`dpo-cache export`."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import wrap

from dpo_cache.cli.output import (
    ProgressLine,
    count,
    format_bytes,
    is_verbose,
    print_json,
    print_table,
    print_text,
    when_stopped,
    with_flags,
)
from dpo_cache.cli.parameters import command
from dpo_cache.log import phase
from dpo_cache.options.exchange import ExportOptions

READERS = {
    "parquet": 'datasets.load_dataset("parquet", data_files="{out}")',
    "jsonl": 'datasets.load_dataset("json", data_files="{out}")',
    "datasets": 'datasets.load_from_disk("{out}")',
}


@command(ExportOptions)
def export_command(options: ExportOptions, as_json: bool) -> None:
    """Write a pair set to a file that other tools read: text, token ids and reference log-probs, one row a
    pair.
    """
    from dpo_cache.planning.start import check_export

    check_export(options)
    when_stopped("no file was written.")
    with ProgressLine("exporting") as line:
        with phase("importing libraries"):
            from dpo_cache.exchange import export_pairs

        with phase("writing the pairs"):
            report = export_pairs(**asdict(options), log=line.remark)
    if as_json:
        print_json(asdict(report))
        return
    columns, *more = wrap(", ".join(report.columns), 70)
    rows = [
        ("pairs", count(report.num_pairs)),
        ("columns", columns),
        *(("", line) for line in more),
        ("written", format_bytes(report.bytes_written)),
    ]
    print_table(f"{report.pairs}: exported as {report.format}", rows)
    if is_verbose():
        for fact in report.left_out:
            print_text(f"Left out: {with_flags(fact)}.")
    print_text(f"The rows are in {report.out}. Next: {READERS[report.format].format(out=report.out)}")
