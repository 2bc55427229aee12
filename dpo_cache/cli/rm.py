"""`dpo-cache rm`."""

from __future__ import annotations

from dataclasses import asdict

from dpo_cache.cli.output import (
    command_line,
    count,
    format_bytes,
    print_columns,
    print_json,
    print_text,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import RmOptions


@command(RmOptions, json_help="Print the files to remove as JSON.")
def rm_command(options: RmOptions, as_json: bool) -> None:
    """Remove a reference with its scores, or a pair set: lists the files, and with --yes removes them.

    A reference with pair sets is not removed, except together with them (--with-pairs).
    """
    if options.yes:
        when_stopped("some files may be removed already. Next: the same command, which removes the rest.")
    from dpo_cache.store import open_cache
    from dpo_cache.store.upkeep.remove import plan_removal, remove

    cache = open_cache(options.cache)
    act = remove if options.yes else plan_removal
    removal = act(cache, options.kind, options.name, with_pairs=options.with_pairs)
    freed = sum(removal.files.values())
    if as_json:
        print_json({"cache": str(cache), "removed": options.yes, "bytes": freed, **asdict(removal)})
        return
    folders = [("reference", name[:12], f"references/{name}/") for name in removal.references]
    folders += [("pair set", name, f"pairs/{name}/") for name in removal.pair_sets]
    rows = []
    for kind, name, folder in folders:
        sizes = [size for file, size in removal.files.items() if file.startswith(folder)]
        rows.append((kind, name, count(len(sizes)), format_bytes(sum(sizes))))
    print_columns(("", "name", "files", "size"), rows)
    what = f"{count(len(removal.files))} files, {format_bytes(freed)}"
    if options.yes:
        print_text(f"{cache}: {what} removed. Next: {command_line('ls', str(cache))}")
    else:
        print_text(
            f"{cache}: {what} would be removed. Nothing was removed. Next: the same command with --yes"
        )
