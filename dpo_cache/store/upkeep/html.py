"""The reports of verify, merge, push and pull as HTML, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.errors import shown_bytes
from dpo_cache.notebook.html import card, facts, note, remarks

if TYPE_CHECKING:
    from dpo_cache.store.upkeep.copy import TransferReport
    from dpo_cache.store.upkeep.merge import MergeReport
    from dpo_cache.store.upkeep.problems import VerifyReport

PROBLEMS = 10  # that are shown


def transfer_html(report: TransferReport) -> str:
    """The files that were sent, and those that were present."""
    rows = [
        ("pair sets", ", ".join(report.pair_sets) or "none"),
        ("references", _ids(report.references)),
        ("sent", f"{report.files_sent:,} files, {shown_bytes(report.bytes_sent)}"),
        ("already present", f"{report.files_present:,} files, {shown_bytes(report.bytes_present)}"),
        ("time", f"{report.elapsed_s:,.1f} s"),
    ]
    return card(f"{report.source} → {report.target}", facts(rows))


def merge_html(report: MergeReport) -> str:
    """The files and entries that were copied, and those that another cache's replaced."""
    rows = [
        ("files copied", f"{report.copied_files:,} ({shown_bytes(report.copied_bytes)})"),
        ("files already present", f"{report.present_files:,}"),
        ("new references", _ids(report.references)),
        ("new pair sets", ", ".join(report.pair_sets) or "none"),
        *(("renamed", f"{before} → {after}") for before, after in report.renamed.items()),
        *(("other pair set of that name left out", name) for name in report.kept),
        *(
            (f"values left out, reference {reference[:12]}", f"{number:,} completions")
            for reference, number in report.overruled.items()
        ),
    ]
    return card(f"Cache {report.cache}: merged", facts(rows))


def verify_html(report: VerifyReport) -> str:
    """The counts of what was checked, the first problems, and the repair."""
    verdict = "no problems" if report.is_whole else f"{len(report.problems):,} problems"
    rows = [
        ("files read", f"{report.files_read:,} of {report.files:,} ({shown_bytes(report.bytes_read)})"),
        ("references", f"{report.references:,}"),
        ("completions", f"{report.completions:,}"),
        ("pair sets", f"{report.pair_sets:,}"),
        ("pairs", f"{report.pairs:,}"),
        ("unreferenced files", f"{len(report.unreferenced):,}" if report.unreferenced else ""),
        ("files of no known kind", f"{len(report.unknown):,}" if report.unknown else ""),
    ]
    rows += [
        (
            f"scored again, reference {entry.reference[:12]}",
            f"{'agrees' if entry.agrees else 'DISAGREES'}, largest gap {entry.largest_gap:.2g} nats a token",
        )
        for entry in report.rescored
    ]
    if report.repair:
        rows.append(("moved aside or removed", f"{len(report.repair.moved):,} files"))
    rest = len(report.problems) - PROBLEMS
    return card(
        f"Cache {report.cache}: {verdict}",
        facts(rows),
        *(note(str(problem)) for problem in report.problems[:PROBLEMS]),
        note(f"… and {rest:,} other problems") if rest > 0 else "",
        *([note("Next:"), *map(note, report.repair.commands)] if report.repair else []),
        remarks(report.remarks),
    )


def _ids(references: list[str]) -> str:
    return ", ".join(entry[:12] for entry in references) or "none"
